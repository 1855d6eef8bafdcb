"""What width rules do not cover: batch size, training horizon and depth. Each is an option; each names its source.

All numbers are of two trainings, proxy and target; a factor multiplies the proxy's value.
"""

import math
from typing import Literal

BatchRule = Literal["sqrt", "linear"]
BATCH_RULES: tuple[BatchRule, ...] = ("sqrt", "linear")
BATCH_SOURCES: dict[BatchRule, str] = {"sqrt": "arXiv 2205.10287, sqrt rule of Adam", "linear": "arXiv 1706.02677"}
EMA_SOURCE = "arXiv 2405.13698, EMA time-scale"
DEPTH_SOURCE = "arXiv 2505.01618, table 1 with alpha = 1/2"


def weight_decay_factor(batch_ratio: float, data_ratio: float, lr_ratio: float = 1.0) -> float:
    """Return the factor on the weight decay that keeps `equilibrium.ema_time_scale`, tau = B / (eta * lambda * D).

        lambda_target / lambda_proxy = (B_target / B_proxy) / ((D_target / D_proxy) * (eta_target / eta_proxy))

    Args:
        batch_ratio: batch of the target over that of the proxy.
        data_ratio: tokens of the target over those of the proxy.
        lr_ratio: base LR of the target over that of the proxy, where another rule changes it. Width rules are no part
            of it: they scale LR and weight decay of each layer from the base values.

    Source: arXiv 2405.13698.

    Raises:
        ValueError: an argument that is not positive.

    >>> weight_decay_factor(batch_ratio=2, data_ratio=8)
    0.25
    """
    _check_positive(batch_ratio=batch_ratio, data_ratio=data_ratio, lr_ratio=lr_ratio)
    return batch_ratio / (data_ratio * lr_ratio)


def batch_lr_factor(rule: BatchRule, batch_ratio: float) -> float:
    """Return the factor on every LR for a larger batch.

    ``sqrt``: sqrt(B_target / B_proxy), for adaptive optimizers where gradients are mostly noise (Malladi et al.,
    arXiv 2205.10287). ``linear``: B_target / B_proxy (Goyal et al., arXiv 1706.02677, for SGD).

    Raises:
        ValueError: an unknown rule, or a ratio that is not positive.

    >>> batch_lr_factor("sqrt", 4), batch_lr_factor("linear", 4)
    (2.0, 4.0)
    """
    _check_positive(batch_ratio=batch_ratio)
    if rule not in BATCH_RULES:
        raise ValueError(f"{rule!r} is no batch rule; there are {', '.join(BATCH_RULES)}")
    return math.sqrt(batch_ratio) if rule == "sqrt" else float(batch_ratio)


def depth_lr_factor(depth_ratio: float, alpha: float = 0.5) -> float:
    """Return the factor on the LR of the layers in residual blocks, for a deeper model.

        (L_target / L_proxy)^(alpha - 1)

    It belongs to residual branches that are multiplied by `depth_residual_factor`.

    Args:
        depth_ratio: layers of the target over those of the proxy.
        alpha: 1/2 scales LR and branch by 1/sqrt(L); 1, the paper's CompleteP proper, the branch alone by 1/L.

    Source: arXiv 2505.01618, table 1.

    Raises:
        ValueError: a ratio that is not positive, or alpha outside of [1/2, 1].

    >>> depth_lr_factor(4)
    0.5
    """
    _check_positive(depth_ratio=depth_ratio)
    _check_alpha(alpha)
    return float(depth_ratio ** (alpha - 1))


def depth_residual_factor(depth_ratio: float, alpha: float = 0.5) -> float:
    """Return the factor on the output of every residual block, (L_target / L_proxy)^-alpha.

    Source: arXiv 2505.01618, table 1.

    Raises:
        ValueError: a ratio that is not positive, or alpha outside of [1/2, 1].

    >>> depth_residual_factor(4)
    0.5
    """
    _check_positive(depth_ratio=depth_ratio)
    _check_alpha(alpha)
    return float(depth_ratio**-alpha)


def _check_alpha(alpha: float) -> None:
    if not 0.5 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, not between 1/2 and 1")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, not a positive number")
