"""What the patch costs per training step with metrics off, as a share of the step: one rank, CPU, one process.

    python benchmarks/patch_overhead.py [--hidden-size 128] [--steps 30]

All that runs per step is the scheduler's subclass and the call after Megatron's `training_log`; at set-up there are the
plan and the audits. Both sides of each pair are timed on the same live objects in turn, so the ratio does not depend on
what else the machine is doing. The dispatch through our wrapper functions is part of the timed calls.
"""

import argparse
import contextlib
import copy
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the median duration of `call`."""
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def main() -> None:
    """Train a few steps under the patch, then time what it added."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()

    from megatron_patch.upstream.cpu.platform import activate

    activate()
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.training import training

    from megatron_patch.entry.run import run

    steps: list[float] = []
    seen: dict[str, Any] = {}
    train_step, train_log = training.train_step, training.training_log

    @functools.wraps(train_step)
    def timed_step(*args: Any, **kwargs: Any) -> Any:
        seen["step"] = (args, kwargs)
        start = time.perf_counter()
        result = train_step(*args, **kwargs)
        steps.append(time.perf_counter() - start)
        return result

    @functools.wraps(train_log)
    def kept_log(*args: Any, **kwargs: Any) -> Any:
        seen["log"] = (args, kwargs)
        return train_log(*args, **kwargs)

    training.train_step, training.training_log = timed_step, kept_log
    width = options.hidden_size
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, open(os.devnull, "w") as nowhere:
        command = (
            f"--cpu --num-layers 4 --hidden-size {width} --num-attention-heads 4 --seq-length 256 "
            "--max-position-embeddings 256 --micro-batch-size 8 --global-batch-size 8 --mock-data "
            "--tokenizer-type NullTokenizer --vocab-size 1023 --normalization RMSNorm --swiglu --disable-bias-linear "
            "--untie-embeddings-and-output-weights --position-embedding-type rope "
            f"--train-iters {options.steps} --lr 0.01 --lr-warmup-iters 2 --lr-decay-style linear --eval-iters 0 "
            f"--eval-interval 1000 --log-interval 100 --tensorboard-dir {folder} --width-scaling sqrt "
            f"--base-hidden-size {width // 4} --extra-warmup decay-away"
        )
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29655")
        with contextlib.redirect_stdout(nowhere):
            run(command.split())
            step_args, step_kwargs = seen["step"]
            scheduler = next(a for a in (*step_args, *step_kwargs.values()) if isinstance(a, OptimizerParamScheduler))
            ours, plain = copy.copy(scheduler), copy.copy(scheduler)
            plain.__class__ = OptimizerParamScheduler
            log_args, log_kwargs = seen["log"]
            patched_log = training.training_log
            pairs = {
                "scheduler.step": (lambda: ours.step(8), lambda: plain.step(8)),
                "training_log": (
                    lambda: patched_log(*log_args, **log_kwargs),
                    lambda: train_log(*log_args, **log_kwargs),
                ),
            }
            added = {}
            for name, (with_patch, without) in pairs.items():
                rounds = [(median_seconds(with_patch, 50), median_seconds(without, 50)) for _ in range(9)]
                added[name] = statistics.median(a - b for a, b in rounds)
    step = statistics.median(steps[3:])
    print(f"median training step, width {width}, 4 layers, 2048 tokens: {step * 1e3:.1f} ms", file=sys.stdout)
    for name, seconds in added.items():
        print(f"added by the patch in {name}: {seconds * 1e6:.0f} us = {100 * seconds / step:.3f} % of the step")
    print(f"together: {100 * sum(added.values()) / step:.3f} % of the step")


if __name__ == "__main__":
    main()
