"""The same question for convolutions: ResNet-50-shaped nets of two widths on images, through megatron_patch.plain.

    python benchmarks/evidence_resnet.py [--workers 2]     # trains what docs/evidence/resnet/trials.csv lacks

Images: two of scikit-learn's handwritten digits beside each other, 16 x 32 pixels, each turned, scaled, moved and made
noisy anew for every batch; asked for are both digits. Those of the evaluation are none of the training's. Nets: stages
of 3, 4, 6 and 3 bottlenecks with 4 times as many channels at their ends, as in ResNet-50, at an eighth and half of its
width.
"""

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from evidence import MEASURED, TABLES, append_rows, identity
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_patch.plain import AlignmentMeter, audit, width_groups
from megatron_patch.runs.trial import DIVERGED, Trial, read_csv, to_csv
from megatron_patch.theory.schedules import linear_warmup_linear_decay

FOLDER = TABLES / "resnet"
NARROW, WIDE = 8, 32
"""Channels of the first stage; ResNet-50 has 64."""
STEPS, WARMUP, BATCH, WEIGHT_DECAY, VECTOR_LR = 1000, 100, 64, 1.2, 2.0**-7
EVERY, EVALUATED, NOISE, CLASSES = 50, 40, 0.2, 10
GRID = (
    *((NARROW, "none", exponent) for exponent in range(-10, -4)),
    *((WIDE, rule, exponent) for rule in ("standard", "independent") for exponent in range(-10, -4)),
)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a residual connection."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, 4 width, H / stride, W / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-50 with `width` channels in its first stage, for small images of one channel."""

    def __init__(self, width: int, outputs: int = 2 * CLASSES) -> None:
        super().__init__()
        stem = [nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        self.stem = nn.Sequential(*stem)
        blocks, inputs = [], width
        for stage, depth in enumerate((3, 4, 6, 3)):
            for block in range(depth):
                blocks.append(Bottleneck(inputs, width * 2**stage, 2 if stage and block == 0 else 1))
                inputs = 4 * width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, outputs)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(
                    module.norm3.weight
                )  # as torchvision's zero_init_residual: deep narrow nets learn sooner
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, H, W] -> logits [B, outputs]."""
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


class Pairs:
    """Batches of pairs of digits, drawn and distorted by a seed of its own."""

    def __init__(self, part: slice, seed: int) -> None:
        digits = load_digits()
        self._images = torch.from_numpy(np.asarray(digits.images, np.float32))[part, None] / 16
        self._labels = torch.from_numpy(np.asarray(digits.target))[part]
        self._random = torch.Generator().manual_seed(seed)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Return images [size, 1, 16, 32] and the two digits of each [size, 2]."""
        of = torch.randint(len(self._labels), (2 * size,), generator=self._random)
        angle, zoom, x, y = torch.rand(4, 2 * size, generator=self._random) * 2 - 1
        angle, zoom = angle * math.pi / 8, 1.1 + 0.3 * zoom
        turn = (
            torch.stack([torch.cos(angle) * zoom, -torch.sin(angle) * zoom, x * 0.3]),
            torch.stack([torch.sin(angle) * zoom, torch.cos(angle) * zoom, y * 0.3]),
        )
        grid = F.affine_grid(torch.stack(turn).permute(2, 0, 1), [2 * size, 1, 16, 16], align_corners=False)
        single = F.grid_sample(self._images[of], grid, align_corners=False)
        images = torch.cat([single[:size], single[size:]], 3)
        images = images + NOISE * torch.randn(images.shape, generator=self._random)
        return images, self._labels[of].view(2, size).T


def loss_of(logits: Tensor, digits: Tensor) -> Tensor:
    """Return the mean cross-entropy of both digits, in nats."""
    return F.cross_entropy(logits.view(len(digits), 2, CLASSES).transpose(1, 2), digits)


def halves(seed: int) -> tuple[Pairs, Pairs]:
    """Return the training's and the evaluation's images; every trial is evaluated on the same."""
    return Pairs(slice(0, 1400), seed), Pairs(slice(1400, None), 0)


def train(width: int, rule: str, lr: float, seed: int, steps: int) -> tuple[Trial, list[SimpleNamespace]]:
    """Train one net; returns its trial and what was measured."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = ResNet(width)
    with torch.device("meta"):
        base = ResNet(NARROW)
    # Of the first convolution the inputs are the image's, at every width.
    optimizer = torch.optim.AdamW(
        width_groups(model, base=base, rule=rule, lr=lr, weight_decay=WEIGHT_DECAY, vector_lr=VECTOR_LR),
        betas=(0.9, 0.95),
    )
    warmup = max(1, WARMUP * steps // STEPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: linear_warmup_linear_decay(step + 1, 1.0, warmup, steps + 1)
    )
    meter, every = AlignmentMeter(model, optimizer, spectral=False), max(1, EVERY * steps // STEPS)
    pairs, held_out = halves(seed)
    lines: list[SimpleNamespace] = []
    settings = Trial(width, lr, DIVERGED, WEIGHT_DECAY, rule, VECTOR_LR, seed, steps)
    audit(optimizer)
    for step in range(1, steps + 1):
        measured = step % every == 0
        if measured:
            meter.begin(step)
        images, digits = pairs.batch(BATCH)
        loss = loss_of(model(images), digits)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for line in meter.end() if measured else ():
            lines.append(SimpleNamespace(**{**dict.fromkeys(MEASURED), **line, "iteration": step}))
        if not math.isfinite(loss.item()):
            return settings, lines
    audit(optimizer)
    model.eval()
    with torch.no_grad():
        losses = [loss_of(model(x), y).item() for x, y in (held_out.batch(256) for _ in range(EVALUATED))]
    return Trial(width, lr, float(np.mean(losses)), WEIGHT_DECAY, rule, VECTOR_LR, seed, steps), lines


def planned(seeds: int) -> Iterator[tuple[int, str, int, int]]:
    """Yield width, rule, log2 of the LR and seed of every trial."""
    for seed in range(1, seeds + 1):
        yield from ((*point, seed) for point in GRID)


def add(folder: Path, trial: Trial, lines: Sequence[SimpleNamespace]) -> None:
    """Add a trial to the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trials.csv"
    trials = [*(read_csv(str(path)) if path.exists() else ()), trial]
    path.write_text(to_csv(sorted(trials, key=lambda t: (t.hidden_size, t.rule, t.lr, t.seed or 0))))
    append_rows(folder / "layers.csv", MEASURED, trial, lines)


def main() -> None:
    """Train what the table lacks, one process for each trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="trials at a time; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds; default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="for a look; default: %(default)s")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER", help="default: docs/evidence/resnet")
    parser.add_argument("--trial", nargs=4, type=str, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trial:
        width, rule, exponent, seed = args.trial
        trial, lines = train(int(width), rule, 2.0 ** int(exponent), int(seed), args.steps)
        add(args.output, trial, lines)
        print(f"width {width} {rule} 2^{exponent} seed {seed}: {trial.loss:.4f}", flush=True)
        return
    path = args.output / "trials.csv"
    there = {identity(trial) for trial in read_csv(str(path))} if path.exists() else set()
    left = [
        point
        for point in planned(args.seeds)
        if identity(Trial(point[0], 2.0 ** point[2], 0.0, WEIGHT_DECAY, point[1], VECTOR_LR, point[3], args.steps))
        not in there
    ]
    print(f"{len(left)} runs to train, {args.workers} at a time")
    options = ["--steps", str(args.steps), "--output", str(args.output)]
    commands = [[sys.executable, __file__, "--trial", *map(str, point), *options] for point in left]
    with ThreadPoolExecutor(args.workers) as pool:
        codes = pool.map(lambda command: subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}), commands)
        sys.exit(max((code.returncode for code in codes), default=0))


if __name__ == "__main__":
    main()
