"""A small training with all of the package's files, what an undisturbed run of it leaves, and ranks that fail.

The run: 7 iterations on 2 tensor-parallel ranks, the rule sqrt, an extra warmup, every metric; it evaluates every 2
and saves every 3 iterations. Faults are put where they hurt by wrapping the functions of Megatron, of PyTorch or of the
package that do the work in question; the ranks are processes and the signals real ones.
"""

import functools
import json
import multiprocessing
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.pool import Pool, RankFailure
from tests.support.training import TINY, Hooks, Outcome, Patched, train

LAST = 7
SAVED = 3  # iterations between checkpoints
FLAGS: tuple[str, ...] = (
    *TINY,
    *"--micro-batch-size 4 --weight-decay 2 --eval-interval 2 --eval-iters 1".split(),
    *"--width-scaling sqrt --base-hidden-size 8 --extra-warmup decay-away".split(),
    # All tokens of the first microbatch: then the numbers are the same whatever the number of data-parallel ranks.
    *"--alignment-interval 1 --alignment-tokens 128 --spectral-interval 2".split(),
    # Optimizer state that another TP, PP or DP size can read as well.
    *"--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --ckpt-format torch_dist".split(),
    "--save-interval",
    str(SAVED),
)
TENSOR = ("--tensor-model-parallel-size", "2")
LINES = ("alignment.jsonl", "equilibrium.jsonl", "sublayers.jsonl")
# Of run.json: what tells when and from where it was written; and of Megatron's arguments, what a resumed run has other.
OF_THE_START = {"started", "updated", "command"}
OF_A_RESUME = {
    "save",
    "load",
    "metrics_dir",
    "iteration",
    "consumed_train_samples",
    "consumed_valid_samples",
    "num_floating_point_operations_so_far",
    "start_step",
    "ckpt_step",
    "do_train",
    "do_valid",
    "do_test",
    "exit_signal_handler",
    "master_port",
}


@dataclass
class Killed(Patched):
    """Kills `rank` with SIGKILL in the middle of what `place` names, when it gets there in iteration `iteration`."""

    place: str
    rank: int
    iteration: int

    def before_arguments(self) -> None:
        super().before_arguments()
        getattr(self, f"in_{self.place}")()

    def now(self) -> bool:
        from megatron.training import get_args

        iteration = (getattr(get_args(), "curr_iteration", None) or 0) + 1
        return int(os.environ["RANK"]) == self.rank and iteration == self.iteration

    @staticmethod
    def die() -> None:
        # Megatron's checkpoint writer has helpers, forked in the pool, which would hold the pool's pipe open.
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        os.kill(os.getpid(), signal.SIGKILL)

    def in_step(self) -> None:
        """When the optimizer has changed some of the weights, and not the others."""
        import torch

        original = torch.optim.AdamW.step

        def step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if self.now():
                optimizer.param_groups[0]["params"][0].data.zero_()
                self.die()
            return original(optimizer, *args, **kwargs)

        torch.optim.AdamW.step = step  # type: ignore[method-assign]

    def in_save(self) -> None:
        """When some of the rank's tensors are in the checkpoint's file, and the next one is written by half."""
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        original = filesystem_async._write_item
        written: list[Any] = []

        @functools.wraps(original)  # Megatron looks at its parameters
        def write_item(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            written.append(result)
            if len(written) % 100 > 2 and self.now():
                stream = next(argument for argument in args if hasattr(argument, "fileno"))
                stream.flush()
                os.ftruncate(stream.fileno(), stream.tell() - 10)
                self.die()
            return result

        filesystem_async._write_item = write_item

    def in_tracker(self) -> None:
        """When the checkpoint is complete, and the file that says so is not yet written."""
        from megatron.training import checkpointing

        original = checkpointing.get_checkpoint_tracker_filename

        def get_checkpoint_tracker_filename(path: str) -> Any:
            if Path(path, f"iter_{self.iteration:07d}", ".metadata").exists() and self.now():
                self.die()
            return original(path)

        checkpointing.get_checkpoint_tracker_filename = get_checkpoint_tracker_filename

    def in_alignment(self, name: str = "alignment.jsonl") -> None:
        """When half of the iteration's lines are in the file, the last of them not to its end."""
        from megatron_patch.files.json_lines import JsonLines

        original = JsonLines._append

        def append(file: JsonLines, data: bytes) -> None:
            if os.path.basename(file._path) == name and self.now():
                original(file, data[: len(data) // 2])
                self.die()
            original(file, data)

        JsonLines._append = append  # type: ignore[method-assign]

    def in_equilibrium(self) -> None:
        """When alignment.jsonl has the iteration, and the next file half of it."""
        self.in_alignment("equilibrium.jsonl")

    def in_record(self) -> None:
        """When the new run.json is written and has not yet replaced the old one."""
        from megatron_patch.files import whole as files

        class System:
            """The module `os`, but for one function."""

            def __getattr__(self, name: str) -> Any:
                return getattr(os, name)

            def replace(system, source: str, target: str) -> None:
                if target.endswith("run.json") and self.now():
                    self.die()
                os.replace(source, target)

        files.os = System()  # type: ignore[assignment]


def start(pool: Pool, folder: Path, *flags: str, hooks: Hooks | None = None, ranks: int = 2) -> Outcome:
    """Start the run in `folder`, from its last checkpoint if it has one, and return what rank 0 saw of it."""
    argv = [*FLAGS, *(TENSOR if "--" not in flags else ()), *(flag for flag in flags if flag != "--")]
    argv = [*argv, "--save", str(folder), "--load", str(folder)]
    outcome: Outcome = pool.run(train, ranks=ranks, argv=argv, steps=LAST, hooks=hooks or Patched())[0]
    return outcome


def die(pool: Pool, folder: Path, place: str, rank: int, iteration: int) -> None:
    """Start the run and assert that the rank is killed."""
    with pytest.raises(RankFailure) as caught:
        start(pool, folder, hooks=Killed(place, rank, iteration))
    assert caught.value.errors.get(rank) == "the process died without a Python exception (exit code -9)", caught.value


def tracker(folder: Path) -> int | None:
    """The iteration of the last complete checkpoint."""
    path = folder / "latest_checkpointed_iteration.txt"
    return int(path.read_text()) if path.exists() else None


def metrics(folder: Path, name: str) -> Any:
    """The content of a JSON file in the metrics folder."""
    return json.loads((folder / "transfer" / name).read_text())


def iterations(folder: Path, name: str = "alignment.jsonl") -> list[int]:
    """The iterations in a file of metrics, in its order, each once; its lines are all whole."""
    lines = [json.loads(line) for line in (folder / "transfer" / name).read_text().splitlines()]
    return list(dict.fromkeys(line["iteration"] for line in lines))


def assert_same_end(outcome: Outcome, folder: Path, whole: tuple[Path, Outcome], iterations_done: int) -> None:
    """The resumed run, which did that many iterations, has ended as the undisturbed one: to the last bit.

    That is: the losses, gradient norms and final weights, every file of metrics, and what the two JSON files say.
    """
    there, undisturbed = whole
    assert len(outcome.losses) == iterations_done
    assert [x.hex() for x in outcome.losses] == [x.hex() for x in undisturbed.losses[LAST - iterations_done :]]
    assert [x.hex() for x in outcome.grad_norms] == [x.hex() for x in undisturbed.grad_norms[LAST - iterations_done :]]
    assert outcome.checksums == undisturbed.checksums
    for name in LINES:
        assert (folder / "transfer" / name).read_bytes() == (there / "transfer" / name).read_bytes(), name
    assert_same_records(folder, there)
    assert sorted(path.name for path in (folder / "transfer").iterdir()) == sorted(
        [*LINES, "hyperparameters.json", "run.json"]
    ), "something is left over"
    assert tracker(folder) == LAST


def assert_same_records(folder: Path, there: Path) -> None:
    """hyperparameters.json is the same but for the iteration of the start, run.json but for the times and paths."""
    mine, theirs = ({**metrics(f, "hyperparameters.json"), "iteration": 0} for f in (folder, there))
    assert mine == theirs
    mine, theirs = (metrics(f, "run.json") for f in (folder, there))
    assert {key for key in mine if mine[key] != theirs[key]} <= OF_THE_START | {"arguments"}
    mine, theirs = mine["arguments"], theirs["arguments"]
    assert {key for key in mine if mine[key] != theirs.get(key)} <= OF_A_RESUME
    assert not re.search(r"NaN|Infinity", json.dumps(metrics(folder, "run.json")["evaluations"]))
