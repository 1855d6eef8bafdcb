"""How far a sweep has come: a bar on a terminal, a line per trial in a log."""

import sys
from collections.abc import Mapping
from types import TracebackType

from megatron_patch.sweep.attempt import DIVERGED, FAILED, FINISHED, PRUNED, Outcome


class SweepProgress:
    """Shows trials done, running, failed and diverged, and the time that is left, on stderr while a `with` block runs.

    Args:
        total: number of trials.
        workers: number of trials that this process runs at a time.
    """

    def __init__(self, total: int, workers: int) -> None:
        self.total = total
        self.workers = workers
        self.counts = dict.fromkeys((FINISHED, DIVERGED, FAILED, PRUNED), 0)
        self.running = 0
        self._seconds: list[float] = []
        """Of the trials trained here."""

    def __enter__(self) -> "SweepProgress":
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("trials"),
                BarColumn(),
                TextColumn("{task.completed:.0f} of {task.total:.0f}{task.fields[state]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, state="")
        return self

    def say(self, line: str) -> None:
        """Print a line above the bar, or into the log."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def ended(self, name: str, outcome: Outcome, seconds: float | None, details: Mapping[str, list[str]]) -> None:
        """Count a trial and tell how it ended.

        Args:
            name: of the trial.
            outcome: of the trial.
            seconds: it took here; None if another process, or an earlier sweep, trained it.
            details: lines to show under a heading.
        """
        self.counts[outcome.kind] += 1
        if seconds is not None and outcome.kind in (FINISHED, DIVERGED):
            self._seconds.append(seconds)
        loss = f" loss {outcome.loss:.4f}" if outcome.kind == FINISHED and outcome.trial else ""
        took = "" if seconds is None else f" in {seconds:.0f} s"
        reason = f": {outcome.reason}" if outcome.reason else ""
        self.say(f"[{self.done}/{self.total}] {name}: {outcome.kind}{loss}{took}{reason}{self.state()}")
        for heading, lines in details.items():
            self.say(f"    {heading}")
            for line in lines:
                self.say(f"    | {line}")

    @property
    def done(self) -> int:
        """Number of trials with an outcome."""
        return sum(self.counts.values())

    def update(self, running: int) -> None:
        """Show how many trials are running, here and elsewhere."""
        self.running = running
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, state=self.state())

    def state(self) -> str:
        """Return ``"; 2 running, 1 failed, about 3 min left"``."""
        others = [f"{count} {kind}" for kind, count in self.counts.items() if kind != FINISHED and count]
        left = self.left()
        return "; " + ", ".join([f"{self.running} running", *others, *([f"about {left} left"] if left else [])])

    def left(self) -> str:
        """Return the time that is left, by the mean of the trials trained here; empty if there is none yet."""
        remaining = self.total - self.done
        if not self._seconds or remaining <= 0:
            return ""
        seconds = sum(self._seconds) / len(self._seconds) * remaining / min(remaining, max(self.workers, self.running))
        return (
            f"{seconds:.0f} s"
            if seconds < 100
            else f"{seconds / 60:.0f} min"
            if seconds < 6000
            else f"{seconds / 3600:.1f} h"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
