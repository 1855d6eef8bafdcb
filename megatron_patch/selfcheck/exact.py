"""Every metric of every layer again, in float64 from the weights and inputs of a step; for one rank.

Shares nothing with `megatron_patch.metrics` but the definitions: inputs are caught by hooks of its own, all tokens of
the micro batch are used, fused norms are computed here, and singular values are LAPACK's.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Metrics = dict[str, dict[str, float]]


class Inputs:
    """The first input and output of every module with a weight matrix, in one forward pass.

    Args:
        model: Megatron's chunks.
    """

    def __init__(self, model: Any) -> None:
        self.caught: dict[str, tuple[torch.nn.Module, list[Any], Tensor]] = {}
        """By the name of the module: itself, its positional arguments, its output."""
        self._handles = {}
        for chunk in model:
            for name, module in chunk.named_modules():
                plain = name.removeprefix("module.").removeprefix("module.")
                if any(p.dim() == 2 for p in module.parameters(recurse=False)) and "embedding" not in plain:
                    self._handles[plain] = module.register_forward_hook(self._hook(plain), with_kwargs=True)

    def _hook(self, name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if name in self._handles:
                self._handles.pop(name).remove()
                values = [*args, *kwargs.values()]
                kept = [v.detach().clone() if isinstance(v, Tensor) else v for v in values]
                first = output[0] if isinstance(output, tuple) else output
                self.caught[name] = module, kept, first.detach().clone()

        return hook

    def close(self) -> None:
        """Remove the hooks of modules that were not called."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}


def exact_metrics(
    inputs: Inputs, weights: Mapping[str, Tensor], updates: Mapping[str, Tensor], config: Any
) -> tuple[Metrics, dict[str, float]]:
    """Return the metrics by line, and how far each layer's real output is from W X.

    Args:
        inputs: of the step.
        weights: what was multiplied with, [K, C], by the parameter's name.
        updates: the gradient parts of the updates, flat, float64, likewise.
        config: the TransformerConfig.

    Returns:
        The metrics that a line of alignment.jsonl has, by its `layer`; and by module `| ‖Y‖ / ‖W X‖ - 1 |`, Y being
        what the layer's own product gave: zero but for the precision that it is made in.
    """
    inputs.close()
    exact: Metrics = {}
    actual: dict[str, float] = {}
    for name, (module, values, output) in inputs.caught.items():
        tokens = values[0].reshape(-1, values[0].shape[-1])
        x = normalised(module, tokens)
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}"
            if parameter.dim() != 2 or full not in weights:
                continue
            own, y = x, output.reshape(-1, output.shape[-1])
            if key != "weight":  # of a grouped linear: the tokens of one expert after the other
                number = int(key.removeprefix("weight"))
                splits = [int(n) for n in values[1]]
                if sum(splits) != x.shape[0]:
                    splits.append(x.shape[0] - sum(splits))  # padding
                own, y = torch.split(x, splits)[number], torch.split(y, splits)[number]
            w = weights[full].double()
            d = updates[full].view_as(w) if full in updates else None
            for part, rows in parts(full, w.shape[0], config, w.device).items():
                exact[full.removesuffix(".weight") + part] = metrics(w[rows], None if d is None else d[rows], own)
            product = float(torch.linalg.matrix_norm(own @ w.T)) if own.shape[0] else 0.0
            if product and getattr(module, "bias", None) is None:
                actual[full.removesuffix(".weight")] = abs(float(torch.linalg.matrix_norm(y.double())) / product - 1)
    return exact, actual


def normalised(module: Any, tokens: Tensor) -> Tensor:
    """Return what a module multiplies, float64: where a norm is fused into it, the norm's output as its dtype has it.

    RMSNorm: `x / sqrt(mean(x^2) + eps) * g`.
    """
    x = tokens.double()
    gain = getattr(module, "layer_norm_weight", None)
    if gain is None:
        return x
    g = gain.detach().double() + (1.0 if module.zero_centered_gamma else 0.0)
    if module.normalization != "RMSNorm":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * g
    bias = getattr(module, "layer_norm_bias", None)
    rounded: Tensor = (y if bias is None else y + bias.detach().double()).to(tokens.dtype)
    return rounded.double()


def parts(name: str, rows: int, config: Any, device: torch.device) -> dict[str, Tensor]:
    """Return the parts of a fused weight and their rows.

    A query group of linear_qkv is [its q heads; k; v]; a gated linear_fc1 is [gates; ups].
    """
    place = torch.arange(rows, device=device)
    if name.endswith(".linear_qkv.weight"):
        queries = config.num_attention_heads // config.num_query_groups * config.kv_channels
        within = place % (queries + 2 * config.kv_channels)
        return {
            "/q": place[within < queries],
            "/k": place[(within >= queries) & (within < queries + config.kv_channels)],
            "/v": place[within >= queries + config.kv_channels],
        }
    if ".linear_fc1." in name and config.gated_linear_unit:
        return {"/gate": place[: rows // 2], "/up": place[rows // 2 :]}
    return {"": place}


def metrics(w: Tensor, d: Tensor | None, x: Tensor) -> dict[str, float]:
    """Return the metrics of one weight [K, C], its update [K, C] and its inputs [B, C], all float64.

    `alpha_W = ‖W X‖ / (‖W‖ ‖X‖)`, likewise of dW; RRC = `‖dW X‖ / ‖W X‖` (arXiv 2510.19093, eqs. 2 to 4).
    """
    found = {"weight_norm": norm(w), "tokens": float(x.shape[0]), "top_singular_value": norm(w, 2)}
    if x.shape[0] == 0:
        return found
    wx, size = norm(x @ w.T), norm(x)
    found["weight_alignment"] = wx / (norm(w) * size)
    if d is not None:
        dx = norm(x @ d.T)
        found["update_norm"] = norm(d)
        found["relative_update"] = norm(d) / norm(w)
        found["update_alignment"] = dx / (norm(d) * size)
        found["alignment_ratio"] = found["update_alignment"] / found["weight_alignment"]
        found["relative_representation_change"] = dx / wx
    return found


def norm(matrix: Tensor, kind: int | str = "fro") -> float:
    """Return the Frobenius norm, or with 2 the largest singular value, computed on the CPU."""
    if kind == 2:
        return float(torch.linalg.svdvals(matrix.cpu())[0])
    return float(torch.linalg.matrix_norm(matrix))
