"""Alignment metrics of one linear layer, from sums of squares, and the noise model that predicts one of them.

A "sum of squares" is that of all entries of a matrix, its squared Frobenius norm: W [fan_out, fan_in] the weight,
dW [fan_out, fan_in] the gradient part of its update (without the decay part), X [fan_in, tokens] the inputs that the
forward pass of the same step used with W. Sums over shards and ranks add up exactly, so reduce them first.

A metric is None where it has no value: its denominator is 0, or some sum is not finite. With a learning rate of 0,
dW = 0: update alignment and alignment ratio are None, while ‖dW‖/‖W‖ is a true 0.
"""

import math


def alignment(output_sumsq: float, matrix_sumsq: float, input_sumsq: float) -> float | None:
    """Return the alignment of a matrix with its inputs: alpha_W of the weight, alpha_dW of the update.

    `alpha_W = ‖W X‖ / (‖W‖ ‖X‖)`, `alpha_dW = ‖dW X‖ / (‖dW‖ ‖X‖)`, in [0, 1] up to rounding of the sums.

    Args:
        output_sumsq: ‖W X‖^2 or ‖dW X‖^2.
        matrix_sumsq: ‖W‖^2 or ‖dW‖^2.
        input_sumsq: ‖X‖^2, of the tokens that went into `output_sumsq`.

    Source: arXiv 2510.19093, eqs. 2 and 3.
    >>> alignment(output_sumsq=9.0, matrix_sumsq=4.0, input_sumsq=9.0), alignment(0.0, 0.0, 9.0)
    (0.5, None)
    """
    return _norm_ratio((output_sumsq,), (matrix_sumsq, input_sumsq))


def alignment_ratio(
    update_output_sumsq: float, update_sumsq: float, weight_output_sumsq: float, weight_sumsq: float
) -> float | None:
    """Return how much better the update is aligned with the inputs than the weight.

    `alpha_dW / alpha_W = ‖dW X‖ ‖W‖ / (‖dW‖ ‖W X‖)`; ‖X‖ cancels.

    Args:
        update_output_sumsq: ‖dW X‖^2.
        update_sumsq: ‖dW‖^2.
        weight_output_sumsq: ‖W X‖^2, of the same tokens.
        weight_sumsq: ‖W‖^2.

    Source: arXiv 2510.19093, eqs. 2 to 4.
    >>> alignment_ratio(update_output_sumsq=4.0, update_sumsq=1.0, weight_output_sumsq=9.0, weight_sumsq=81.0)
    6.0
    """
    return _norm_ratio((update_output_sumsq, weight_sumsq), (update_sumsq, weight_output_sumsq))


def relative_update(update_sumsq: float, weight_sumsq: float) -> float | None:
    """Return the relative weight update.

    `RWU = ‖dW‖ / ‖W‖`

    Args:
        update_sumsq: ‖dW‖^2.
        weight_sumsq: ‖W‖^2, before the step.

    Source: arXiv 2510.19093, eq. 4.
    >>> relative_update(update_sumsq=1.0, weight_sumsq=16.0), relative_update(1.0, 0.0)
    (0.25, None)
    """
    return _norm_ratio((update_sumsq,), (weight_sumsq,))


def relative_representation_change(update_output_sumsq: float, weight_output_sumsq: float) -> float | None:
    """Return the relative change that the update of one layer makes to that layer's output.

    `RRC = ‖dW X‖ / ‖W X‖ = (alpha_dW / alpha_W) * RWU`

    Args:
        update_output_sumsq: ‖dW X‖^2.
        weight_output_sumsq: ‖W X‖^2, of the same tokens.

    Source: arXiv 2510.19093, eq. 4.
    >>> relative_representation_change(update_output_sumsq=4.0, weight_output_sumsq=16.0)
    0.5
    """
    return _norm_ratio((update_output_sumsq,), (weight_output_sumsq,))


def noise_model_update_alignment(fan_in: int, tokens: int, snr: float) -> float:
    """Return the update alignment of a layer whose gradient is a common signal plus independent noise.

    `alpha_dW = sqrt(N / ((1 + B phi) (1 + phi) C B))`, with
    `N = (C + 2) + (B - 1) + (1 + B)^2 phi + phi (B - 1) + B^2 phi^2 (C + 2) + 2 B phi C`, C = `fan_in`, B = `tokens`,
    phi = `snr`. It is the root of a ratio of expectations for one output row `dW = sum_b x_b^T` and inputs
    `x_b = sqrt(phi) s + n_b`, with s and n_b standard normal (derived); as such it can pass 1, up to `sqrt(1 + 2/C)`.

    Args:
        fan_in: number of inputs of the layer, >= 1.
        tokens: number of tokens in the batch, >= 1.
        snr: signal-to-noise ratio of one token's gradient, squared norm over squared norm, >= 0.

    Raises:
        ValueError: an argument is outside its range.

    Source: arXiv 2510.19093, eq. 27.
    >>> round(noise_model_update_alignment(fan_in=128, tokens=1024, snr=0.001), 7)
    0.0990076
    """
    _require_noise_model(fan_in, tokens, snr)
    c, b, phi = fan_in, tokens, snr
    noise = (c + 2) + (b - 1)
    cross = (1 + b) ** 2 * phi + phi * (b - 1) + 2 * b * phi * c
    signal = b**2 * phi**2 * (c + 2)
    return math.sqrt((noise + cross + signal) / ((1 + b * phi) * (1 + phi) * c * b))


def noise_model_update_alignment_approximate(fan_in: int, tokens: int, snr: float) -> float:
    """Return the three-term approximation of `noise_model_update_alignment`.

    `alpha_dW ~ sqrt(1/C + 1/B + phi / (1 + phi))`, with C = `fan_in`, B = `tokens`, phi = `snr`: close for large C, B.

    Args:
        fan_in: number of inputs of the layer, >= 1.
        tokens: number of tokens in the batch, >= 1.
        snr: signal-to-noise ratio of one token's gradient, >= 0.

    Raises:
        ValueError: an argument is outside its range.

    Source: arXiv 2510.19093, eq. 28.
    >>> round(noise_model_update_alignment_approximate(fan_in=128, tokens=1024, snr=0.001), 7)
    0.0989346
    """
    _require_noise_model(fan_in, tokens, snr)
    return math.sqrt(1 / fan_in + 1 / tokens + snr / (1 + snr))


def critical_batch_size(snr: float) -> float:
    """Return the batch size, in tokens, from which on a larger batch no longer lowers the update alignment much.

    `1 / phi + 1`, with phi = `snr`: there the terms 1/B and phi / (1 + phi) of eq. 28 are equal.

    Args:
        snr: signal-to-noise ratio of one token's gradient, > 0.

    Raises:
        ValueError: `snr` is not positive.

    Source: arXiv 2510.19093, eq. 28.
    >>> critical_batch_size(snr=0.001)
    1001.0
    """
    if not snr > 0:
        raise ValueError(f"snr {snr}: expected a positive number")
    return 1 / snr + 1


def _norm_ratio(numerator_sumsqs: tuple[float, ...], denominator_sumsqs: tuple[float, ...]) -> float | None:
    """Divide products of norms; the root is taken first, so that products of sums cannot overflow."""
    numerator = math.prod(math.sqrt(sumsq) for sumsq in numerator_sumsqs)
    denominator = math.prod(math.sqrt(sumsq) for sumsq in denominator_sumsqs)
    if denominator == 0:
        return None
    ratio = numerator / denominator
    return ratio if math.isfinite(ratio) and math.isfinite(denominator) else None


def _require_noise_model(fan_in: int, tokens: int, snr: float) -> None:
    if not (fan_in >= 1 and tokens >= 1 and snr >= 0):
        raise ValueError(f"fan_in {fan_in}, tokens {tokens}, snr {snr}: expected >= 1, >= 1 and >= 0")
