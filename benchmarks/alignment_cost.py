"""What the alignment metrics cost: a measured step against a plain one, and against the naive way, in one run on CPU.

    python benchmarks/alignment_cost.py [--rounds 8] [--hidden-size 512]

Steps of four kinds take turns on the same live model, so that whatever else the machine does falls on all of them:
plain; with the metrics of every layer; with top singular values as well; and the naive way, which clones all weights
and, after the step, sends the full batch through old and new weights. Ratios are medians over the rounds.
"""

import argparse
import contextlib
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

KINDS = ("plain", "metrics", "metrics and singular values", "naive")
WARMUP_ROUNDS = 1
MICROBATCHES = 2


def command(hidden_size: int, steps: int) -> list[str]:
    """Return Megatron's flags: 4 layers, 4096 tokens a step in two microbatches, everything in fp32."""
    return (
        f"--cpu --num-layers 4 --hidden-size {hidden_size} --num-attention-heads 8 --seq-length 512 "
        "--max-position-embeddings 512 --micro-batch-size 4 --global-batch-size 8 --mock-data "
        "--tokenizer-type NullTokenizer --vocab-size 4095 --normalization RMSNorm --swiglu --disable-bias-linear "
        "--group-query-attention --num-query-groups 4 --untie-embeddings-and-output-weights "
        f"--position-embedding-type rope --train-iters {steps} --lr 0.001 --lr-warmup-iters 2 --eval-iters 0 "
        f"--eval-interval 100000 --log-interval 1000 --weight-decay 0.1"
    ).split()


class Naive:
    """The obvious implementation: no sampling, a copy of everything, one more forward pass for two sets of weights."""

    def __init__(self, model: Any, forward: Callable[[], None]) -> None:
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

        self.model, self.forward = model, forward
        linears = (ColumnParallelLinear, RowParallelLinear)
        self.modules = {name: m for name, m in model.named_modules() if isinstance(m, linears)}
        self.old: dict[str, Any] = {}
        self.result: dict[str, tuple[float, float, float]] = {}

    def before(self) -> None:
        """Clone all weights."""
        self.old = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def after(self) -> None:
        """Run the batch through the old weights, and each layer's input through the new ones too."""
        import torch

        new = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        sums = {name: torch.zeros(3) for name in self.modules}

        def hook(name: str, module: Any, args: Any, output: Any) -> None:
            x, y = args[0], output[0]
            change = x @ new[f"{name}.weight"].T - y
            sums[name] += torch.stack([x.square().sum(), y.square().sum(), change.square().sum()])

        handles = [m.register_forward_hook(functools.partial(hook, name)) for name, m in self.modules.items()]
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.old[name])
            self.forward()
            for name, parameter in self.model.named_parameters():
                parameter.copy_(new[name])
        for handle in handles:
            handle.remove()
        self.result = {name: tuple(total.sqrt().tolist()) for name, total in sums.items()}
        self.old = {}


class Turns:
    """Lets the four kinds of steps take turns and times them."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.added: dict[str, list[float]] = {kind: [] for kind in KINDS[1:3]}
        self.held_bytes = 0
        self.layers = 0
        self.parameters = 0
        self._count = 0
        self._monitors: dict[str, Any] = {}
        self._active: Any = None
        self._forward_step: Any = None
        self._spent = 0.0

    def start(self, forward_step: Any, model: Any, optimizer: Any) -> None:
        """Build the monitors once model and optimizer exist."""
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config
        from megatron.training import get_args

        from megatron_patch.config import MetricsConfig, WidthConfig
        from megatron_patch.upstream.monitor.monitor import AlignmentMonitor
        from megatron_patch.upstream.width.parameters import describe

        parameters = list(describe(model, get_model_config(model[0]), WidthConfig(), parallel_state))
        for kind, spectral in ((KINDS[1], 0), (KINDS[2], 1)):
            settings = MetricsConfig(
                alignment_interval=1, spectral_interval=spectral, directory=f"{self.folder}/{kind}"
            )
            self._monitors[kind] = AlignmentMonitor(settings, model, parameters, optimizer, get_args())
        self.layers = len(self._monitors[KINDS[1]].layers)
        self.parameters = sum(p.parameter.numel() for p in parameters)
        self._forward_step = forward_step
        zero_grad, step = optimizer.zero_grad, optimizer.step

        def begin(*args: Any, **kwargs: Any) -> None:
            zero_grad(*args, **kwargs)
            if self._active:
                self._clocked(self._active.begin_step)

        def measured() -> Any:
            if not self._active:
                return step()
            self._clocked(self._active.before_update)
            self.held_bytes = max(self.held_bytes, self._active.held_bytes)
            result = step()
            self._clocked(lambda: self._active.after_update(True))
            return result

        optimizer.zero_grad, optimizer.step = begin, measured

    def _clocked(self, call: Callable[[], None]) -> None:
        start = time.perf_counter()
        call()
        self._spent += time.perf_counter() - start

    def step(self, train_step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make one training step of the kind whose turn it is."""
        import torch

        kind = KINDS[self._count % len(KINDS)]
        self._active = self._monitors.get(kind)
        iterator, model = args[1], args[2][0]

        def forward() -> None:
            for _ in range(MICROBATCHES):
                self._forward_step(iterator, model)

        naive = Naive(model, forward)
        self._spent = 0.0
        start = time.perf_counter()
        if kind == "naive":
            naive.before()
        result = train_step(*args, **kwargs)
        if kind == "naive":
            with torch.no_grad():
                naive.after()
        if self._count >= WARMUP_ROUNDS * len(KINDS):
            self.seconds[kind].append(time.perf_counter() - start)
            if self._active:
                self.added[kind].append(self._spent)
        self._count += 1
        return result


def report(turns: Turns, hidden_size: int) -> None:
    """Print what was measured."""
    plain = statistics.median(turns.seconds["plain"])
    size = 4 * turns.parameters
    print(
        f"width {hidden_size}, 4 layers, 4096 tokens a step, {turns.parameters / 1e6:.1f} M parameters, "
        f"{turns.layers} lines, {len(turns.seconds['plain'])} rounds"
    )
    print(f"plain step: {plain:.3f} s")
    for kind in KINDS[1:]:
        ratio = statistics.median(a / b for a, b in zip(turns.seconds[kind], turns.seconds["plain"], strict=True))
        line = f"{kind}: {statistics.median(turns.seconds[kind]):.3f} s, {ratio:.3f} of a plain step"
        if kind in turns.added:
            share = statistics.median(a / b for a, b in zip(turns.added[kind], turns.seconds["plain"], strict=True))
            line += (
                f"; inside our calls {100 * share:.2f} % of a plain step, so {10 * share:.3f} % at an interval of 10"
            )
        else:
            line += f", {10 * (ratio - 1):.2f} % at an interval of 10"
        print(line)
    print(
        f"held by the metrics: {turns.held_bytes / 2**20:.1f} MiB, that is {turns.held_bytes / size:.2f} of the weights"
    )
    print(f"held by the naive way: {2 * size / 2**20:.1f} MiB of weights alone")


def main() -> None:
    """Train with the four kinds of steps in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()

    from megatron_patch.upstream.cpu.platform import activate

    activate()
    from megatron.training import training

    from megatron_patch.entry.run import run

    train_step, train = training.train_step, training.train
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        turns = Turns(folder)

        @functools.wraps(train)
        def watched_train(forward_step: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            turns.start(forward_step, model, optimizer)
            return train(forward_step, model, optimizer, *args, **kwargs)

        @functools.wraps(train_step)
        def timed_step(*args: Any, **kwargs: Any) -> Any:
            return turns.step(train_step, args, kwargs)

        training.train_step, training.train = timed_step, watched_train
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29656")
        steps = len(KINDS) * (options.rounds + WARMUP_ROUNDS)
        with contextlib.redirect_stdout(nowhere):
            run(command(options.hidden_size, steps))
    report(turns, options.hidden_size)


if __name__ == "__main__":
    main()
