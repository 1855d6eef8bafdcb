"""All singular values of a model's matrices, from a checkpoint of a run of configs/evidence."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.enums import AttnBackend, InferenceCudaGraphScope


@dataclass(frozen=True)
class SingularValue:
    """One of a matrix; `place` counts them from the largest, 0."""

    iteration: int
    layer: str
    place: int
    value: float


def singular_values(checkpoint: Path) -> Iterator[SingularValue]:
    """Yield all singular values of the matrices in the decoder, from a checkpoint of one rank (--ckpt-format torch).

    Fused ones are taken apart: a gated linear_fc1 into gate and up, linear_qkv [heads * 3 * d_head, d] into q, k and v.
    """
    numpys: tuple[Any, ...] = (np.ndarray, np.dtype, np.dtypes.UInt32DType, np.empty(0).__reduce__()[0])
    with torch.serialization.safe_globals([*numpys, argparse.Namespace, AttnBackend, InferenceCudaGraphScope, Signals]):
        state = torch.load(checkpoint, weights_only=True)
    heads = state["args"].num_attention_heads
    for name, weight in state["model"].items():
        if not (name.startswith("decoder.layers.") and weight is not None and weight.dim() == 2):
            continue
        layer, columns = name.removesuffix(".weight"), weight.shape[1]
        parts = {layer: weight}
        if layer.endswith("linear_fc1"):
            parts = dict(zip((f"{layer}/gate", f"{layer}/up"), weight.chunk(2), strict=True))
        elif layer.endswith("linear_qkv"):
            by_head = weight.view(heads, 3, -1, columns)
            parts = {f"{layer}/{part}": by_head[:, i].reshape(-1, columns) for i, part in enumerate("qkv")}
        for part, matrix in parts.items():
            for place, value in enumerate(torch.linalg.svdvals(matrix.double()).tolist()):
                yield SingularValue(state["iteration"], part, place, value)
