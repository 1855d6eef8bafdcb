"""What a measured step costs by arithmetic, for a config of Megatron flags: the table in docs/metrics.md.

    python benchmarks/alignment_cost_model.py configs/target_7b_h100_bf16.yaml --data-parallel-size 32
    python benchmarks/alignment_cost_model.py configs/target_70b_h100_bf16.yaml --data-parallel-size 16

Per rank, for a dense model with gated MLPs, bf16 activations and the distributed optimizer; the last pipeline stage,
which also holds the LM head. The formulas are those of docs/metrics.md; nothing here is measured.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import yaml

BUCKET_ELEMENTS = 1 << 24
"""As in megatron_patch/metrics/reduce.py."""
ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class Matrix:
    """One linear layer of the stage: global fan-out and fan-in, how it is split, how many lines it has."""

    fan_out: int
    fan_in: int
    column: bool
    lines: int = 1


def matrices(flags: dict[str, Any]) -> list[Matrix]:
    """Return the linear layers of the last pipeline stage."""
    hidden, heads = int(flags["hidden-size"]), int(flags["num-attention-heads"])
    head = flags.get("kv-channels", hidden // heads)
    groups = flags.get("num-query-groups", heads) if flags.get("group-query-attention") else heads
    ffn = int(flags["ffn-hidden-size"])
    layer = [
        Matrix((heads + 2 * groups) * head, hidden, True, 3),
        Matrix(hidden, heads * head, False),
        Matrix(2 * ffn, hidden, True, 2),
        Matrix(hidden, ffn, False),
    ]
    vocabulary = Matrix(flags.get("padded-vocab-size", 32000), hidden, True)
    return layer * int(flags["num-layers"] // flags.get("pipeline-model-parallel-size", 1)) + [vocabulary]


def rows(matrix: Matrix, tp: int) -> int:
    """Return the local fan-out."""
    return matrix.fan_out // tp if matrix.column else matrix.fan_out


def costs(flags: dict[str, Any], dp: int, tokens: int | None = None) -> dict[str, float]:
    """Return the cost of one measured step on one rank: FLOPs, bytes by purpose, memory, collectives.

    Args:
        flags: Megatron's, without dashes in front.
        dp: data-parallel size.
        tokens: sampled per data-parallel rank; None = the default.
    """
    tp = flags.get("tensor-model-parallel-size", 1)
    scattered = bool(flags.get("sequence-parallel")) and tp > 1
    microbatch = flags["micro-batch-size"] * flags["seq-length"]
    step_tokens = flags["global-batch-size"] * flags["seq-length"] // dp
    b = min(tokens or max(64, step_tokens // 64), microbatch)
    layers = matrices(flags)
    local = sum(m.fan_out * m.fan_in for m in layers) / tp
    others = (tp - 1) / tp
    gathered = sum(m.fan_in for m in layers if m.column)
    inputs_local = sum(m.fan_in if m.column else m.fan_in // tp for m in layers)
    held = sum(m.fan_in // tp if scattered or not m.column else m.fan_in for m in layers)
    chunk, chunks = 0, 1
    for m in layers:
        size = b * (m.fan_in if m.column else m.fan_in // tp)
        if chunk and chunk + size > BUCKET_ELEMENTS:
            chunk, chunks = 0, chunks + 1
        chunk += size
    row_outputs = sum(m.fan_out for m in layers if not m.column)
    widest = max(m.fan_in if m.column else m.fan_in // tp for m in layers)
    lines = flags.get("pipeline-model-parallel-size", 1) * sum(m.lines for m in layers)
    reductions = -(-2 * row_outputs * b // BUCKET_ELEMENTS) if tp > 1 else 0
    return {
        "sampled tokens B": b,
        "FLOPs, fp32": 4 * local * b,
        "FLOPs of the training step": 6 * local * step_tokens,
        "bytes: scattered tokens, gathered twice": (2 * ACTIVATION_BYTES * gathered * b * others) if scattered else 0,
        "bytes: tokens to the owners of dW": ACTIVATION_BYTES * inputs_local * b * (dp - 1) / dp,
        "bytes: row-parallel outputs": 4 * 2 * row_outputs * b * others,
        "bytes: all sums": 2 * 8 * 10 * lines,
        "memory: slices of W": 4 * local / dp,
        "memory: sampled inputs": ACTIVATION_BYTES * held * b,
        "memory: chunk of inputs, sent and received": 3 * ACTIVATION_BYTES * max(BUCKET_ELEMENTS, widest * b),
        "memory: one layer's W and outputs": max(4 * (m.fan_out * m.fan_in // tp + rows(m, tp) * b) for m in layers),
        "collectives": (2 * chunks if scattered else 0) + (1 + chunks if dp > 1 else 0) + reductions + 1,
    }


def main() -> None:
    """Print the costs of one config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--data-parallel-size", type=int, required=True)
    parser.add_argument("--alignment-tokens", type=int)
    options = parser.parse_args()
    with open(options.config, encoding="utf-8") as file:
        flags = yaml.safe_load(file)
    for name, value in costs(flags, options.data_parallel_size, options.alignment_tokens).items():
        print(f"{name:45s} {_readable(name, value)}")


def _readable(name: str, value: float) -> str:
    if name.startswith("FLOPs"):
        return f"{value:.3g}"
    if name.startswith(("bytes", "memory")):
        return f"{value / 1e9:.3f} GB" if value > 1e6 else f"{value / 1e3:.1f} kB"
    return f"{value:.0f}"


if __name__ == "__main__":
    main()
