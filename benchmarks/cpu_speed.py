"""What a training step of Megatron on CPU takes over the same step of plain torch: one process, steps in turn.

    OMP_NUM_THREADS=1 python benchmarks/cpu_speed.py [--hidden-size 32 128] [--steps 100]

The plain side is what one would write by hand: nn.Embedding, nn.Linear, functional.rms_norm, rope, causal
scaled_dot_product_attention, SwiGLU, cross_entropy, clip_grad_norm_, torch's AdamW, on batches cut out of one array.
The model has the same shape and as many tokens a step as the evidence runs' (docs/evidence.md). Megatron's side is
everything from one step to the next: data, step, scheduler, hooks of this package, log. Medians over the steps, so the
ratio hardly depends on what else the machine does.
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

LAYERS, HEAD, LENGTH, SEQUENCES, VOCABULARY = 2, 16, 128, 16, 512


def command(width: int, steps: int, data: str) -> str:
    """Return Megatron's command line."""
    return (
        f"--cpu --num-layers {LAYERS} --hidden-size {width} --num-attention-heads {width // HEAD} "
        f"--kv-channels {HEAD} --ffn-hidden-size {3 * width} --swiglu --normalization RMSNorm --disable-bias-linear "
        "--untie-embeddings-and-output-weights --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0 "
        f"--seq-length {LENGTH} --max-position-embeddings {LENGTH} --tokenizer-type NullTokenizer "
        f"--vocab-size {VOCABULARY - 1} --data-path {data} --split 100,0,0 --micro-batch-size {SEQUENCES} "
        f"--global-batch-size {SEQUENCES} --train-iters {steps} --lr 0.01 --lr-warmup-iters 10 "
        "--lr-decay-style linear --weight-decay 0.1 --adam-beta2 0.95 --eval-iters 0 --eval-interval 100000 "
        "--log-interval 100 --no-create-attention-mask-in-dataloader --num-workers 0 --width-scaling independent "
        f"--base-hidden-size {max(width // 4, HEAD)} --no-report"
    )


def plain_step(width: int) -> Any:
    """Return a function that trains the plain model one step on a batch and returns its loss."""
    import torch
    from torch import nn
    from torch.nn import functional

    half = HEAD // 2
    angles = torch.arange(LENGTH)[:, None] / 10000 ** (torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()

    def rope(x: Any) -> Any:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain1, self.gain2 = (nn.Parameter(torch.ones(width)) for _ in range(2))
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.out = nn.Linear(width, width, bias=False)
            self.up = nn.Linear(width, 6 * width, bias=False)
            self.down = nn.Linear(3 * width, width, bias=False)

        def forward(self, x: Any) -> Any:
            q, k, v = (
                t.view(*x.shape[:2], -1, HEAD).transpose(1, 2)
                for t in self.qkv(functional.rms_norm(x, (width,), self.gain1, 1e-5)).chunk(3, dim=-1)
            )
            mixed = functional.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
            gate, value = self.up(functional.rms_norm(x, (width,), self.gain2, 1e-5)).chunk(2, dim=-1)
            return x + self.down(functional.silu(gate) * value)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, width)
            self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
            self.gain = nn.Parameter(torch.ones(width))
            self.output = nn.Linear(width, VOCABULARY, bias=False)

        def forward(self, tokens: Any) -> Any:
            return self.output(functional.rms_norm(self.layers(self.embedding(tokens)), (width,), self.gain, 1e-5))

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)

    def step(batch: Any) -> float:
        tokens = torch.from_numpy(batch.astype(np.int64))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def measure(width: int, steps: int) -> None:
    """Train both in turn and print their medians."""
    from megatron_patch.upstream.cpu.platform import activate

    activate()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from megatron.training import training

    from megatron_patch.entry.run import run

    train_step = training.train_step
    starts: list[float] = []
    plain: list[float] = []
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCABULARY - 1, 1_000_000).astype(np.uint16)
    by_hand = plain_step(width)

    @functools.wraps(train_step)
    def in_turn(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        first = random.integers(0, len(tokens) - LENGTH - 1, SEQUENCES)
        loss = by_hand(np.stack([tokens[i : i + LENGTH + 1] for i in first]))
        assert math.isfinite(loss)
        plain.append(time.perf_counter() - start)
        starts.append(start)
        return train_step(*args, **kwargs)

    training.train_step = in_turn
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, open(os.devnull, "w") as nowhere:
        builder = IndexedDatasetBuilder(f"{folder}/data.bin", dtype=np.uint16)
        for document in np.split(tokens, 1000):
            builder.add_document(document, [len(document)])
        builder.finalize(f"{folder}/data.idx")
        with contextlib.redirect_stdout(nowhere):
            run(f"{command(width, steps, f'{folder}/data')} --data-cache-path {folder}/cache".split())
    both = [b - a for a, b in itertools.pairwise(starts)]
    pairs = [(total - own, own) for total, own in zip(both, plain, strict=False)][10:]
    megatron, own = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"width {width:4}: Megatron {megatron * 1e3:.1f} ms a step, plain torch {own * 1e3:.1f} ms: {ratio:.2f} times"
    )


def main() -> None:
    """Measure every width in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    if len(options.hidden_size) == 1:
        measure(options.hidden_size[0], options.steps)
        return
    for width in options.hidden_size:
        subprocess.run(
            [sys.executable, __file__, "--hidden-size", str(width), "--steps", str(options.steps)], check=True
        )


if __name__ == "__main__":
    main()
