"""Run a sweep: start its trials, a few at a time, and keep count of how they end.

The state of a sweep is its folders. A trial is done when its run.json says ``finished`` or ``diverged`` and its
config.yaml is what the sweep would write; anything else is trained again. Several processes can work on one sweep.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from megatron_patch.errors import ConfigError, ExitCode
from megatron_patch.files.run_json import RUN_JSON
from megatron_patch.files.whole import write_text
from megatron_patch.runs.trial import Trial, to_csv
from megatron_patch.sweep.attempt import (
    DIVERGED,
    FAILED,
    FINISHED,
    GRACE_SECONDS,
    PRUNED,
    Attempt,
    Claim,
    Outcome,
    failure,
    failure_kind,
    last_lines,
    settled,
    submitted,
)
from megatron_patch.sweep.axes import PlannedTrial
from megatron_patch.sweep.file import Search, SweepFile, TwoPhase
from megatron_patch.sweep.progress import SweepProgress
from megatron_patch.sweep.sources import Grid, Phases, Source

POLL_SECONDS = 0.1
ELSEWHERE_SECONDS = 1.0
"""Between two looks at a trial that another process runs."""
PRUNE_SECONDS = 2.0
"""Between two looks at the evaluations of a running trial."""


SAME_FAILURES = 3
"""So many first trials that fail in one way are a mistake that the others would repeat."""


class Interrupted(Exception):
    """SIGINT or SIGTERM came."""


class Hopeless(Exception):
    """The first trials all failed in one and the same way."""


def make_source(file: SweepFile) -> Source:
    """Return where the sweep's trials come from. For a sampler, makes or opens the study.

    Raises:
        ConfigError: the study cannot be used.
    """
    if isinstance(file.plan, Search):
        from megatron_patch.sweep.optuna_study import OptunaStudy  # Optuna takes a second to import

        return OptunaStudy(file, file.plan)
    return Phases(file.plan) if isinstance(file.plan, TwoPhase) else Grid(file.plan)


def run_sweep(
    file: SweepFile,
    workers: int = 1,
    resume: bool = False,
    *,
    keep_going: bool = False,
    before: Callable[[], None] = lambda: None,
    ending: Callable[[Sequence[Trial]], Sequence[str]] = lambda trials: (),
) -> int:
    """Run the trials of a sweep that are not done yet, and write ``trials.csv`` in its folder.

    Args:
        file: the sweep.
        workers: number of trials to run at a time in this process.
        resume: go on with a sweep that has trials, or help another process with it.
        keep_going: do not stop where the first trials all fail in one and the same way.
        before: called when the sweep could start, before anything is written; what it raises is passed on.
        ending: what to say at the end of the trials that have a loss or diverged.

    Returns:
        The exit code: 0 if every trial finished, diverged or was pruned; 1 if some failed, or the first ones all did;
        130 if interrupted.

    Raises:
        ConfigError: the output has trials and `resume` is off, a trial that is done has other flags than it would get
            now, or the command cannot be started. No training is left running.
    """
    if workers < 1:
        raise ConfigError("--workers", workers, "an integer >= 1", "give the number of trials to run at a time")
    trials = os.path.join(file.output, "trials")
    if not resume and os.path.isdir(trials) and os.listdir(trials):
        fix = "add --resume to go on with them, or choose another output"
        raise ConfigError("output", file.output, "a folder without trials", fix)
    before()
    try:
        os.makedirs(trials, exist_ok=True)
        return _Engine(file, make_source(file), workers, keep_going, ending).run()
    except OSError as error:
        where = error.filename or file.output
        raise ConfigError("output", where, "a folder that can be written to", str(error.strerror or error)) from None


class _Engine:
    """Runs one sweep in this process."""

    def __init__(
        self,
        file: SweepFile,
        source: Source,
        workers: int,
        keep_going: bool,
        ending: Callable[[Sequence[Trial]], Sequence[str]],
    ) -> None:
        self.file = file
        self.source = source
        self.workers = workers
        self.keep_going = keep_going
        self.ending = ending
        self.started = time.time()
        self.progress = SweepProgress(source.total, workers)
        self.running: dict[str, Attempt] = {}
        self.outcomes: dict[str, Outcome] = {}
        self._elsewhere: dict[str, float] = {}
        """Trials that other processes run, with the time to look again."""
        self._failures: list[str] = []
        """How the trials failed that were trained here."""
        self._next_prune = 0.0
        self._stop = False

    def run(self) -> int:
        restore = self._catch_signals()
        try:
            with self.progress:
                self._recount()
                try:
                    while not self.source.complete():
                        if not self._alike():
                            self._fill()
                        elif not self.running:
                            raise Hopeless
                        self._collect()
                        self._prune()
                        self.progress.update(len(self.running) + len(self._elsewhere))
                        if self._stop:
                            raise Interrupted
                        time.sleep(POLL_SECONDS)
                finally:
                    interrupted = self._end_all()
                    self._write_table()
        except Interrupted:
            return self._say_interrupted(interrupted)
        except Hopeless:
            return self._say_hopeless()
        finally:
            restore()
        return self._summary()

    def _catch_signals(self) -> Callable[[], None]:
        """Let SIGINT and SIGTERM end the sweep at its next step; returns how to undo that."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop = True

        before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        return restore

    def _recount(self) -> None:
        """Count what is done without us. At the start a changed flag is found here, before anything is written."""
        count = -1
        while count != len(self.outcomes):  # what is done of one phase may open the next
            count = len(self.outcomes)
            for trial in self.source.waiting():
                outcome = None if trial.name in self.running else self._known(trial)
                if outcome:
                    self._settle(trial, outcome, None)

    def _known(self, trial: PlannedTrial) -> Outcome | None:
        """Return the outcome that stands in a trial's folder, if it need not be trained again."""
        folder = self.file.folder(trial)
        outcome = settled(folder)
        if outcome and outcome.kind != FAILED:
            self._check_unchanged(trial)
            return outcome
        return failure(folder, self.started) or self.source.known(trial)

    def _check_unchanged(self, trial: PlannedTrial) -> None:
        folder = self.file.folder(trial)
        if not os.path.exists(os.path.join(folder, "config.yaml")):
            fix = "restore it, or move the folder away"
            raise ConfigError(folder, "(a run without config.yaml)", "a trial of this sweep", fix)
        difference = self.file.difference(trial)
        if difference:
            flag, old, new = difference
            raise ConfigError(
                f"trial {trial.name}: {flag}",
                "left out" if new is None else new,
                f"{'no such flag' if old is None else old}, with which the trial was trained",
                "restore it, choose another output, or remove the trial's folder",
            )

    def _fill(self) -> None:
        """Start trials in the free slots."""
        if len(self.running) >= self.workers:
            return
        for trial in self.source.waiting():
            if self._stop or len(self.running) >= self.workers:
                return
            if trial.name not in self.running and self._elsewhere.get(trial.name, 0.0) <= time.monotonic():
                self._take(trial)
        while not self._stop and len(self.running) < self.workers:
            made = self.source.new()
            if made is None:
                return
            self._take(made)

    def _take(self, trial: PlannedTrial) -> None:
        """Start a trial unless it is done, or another process has it."""
        claim = Claim.take(self.file.output, trial.name)
        if claim is None:
            self._elsewhere[trial.name] = time.monotonic() + ELSEWHERE_SECONDS
            return
        attempt = None
        try:
            outcome = self._known(trial)  # only now: until the claim was ours somebody may have finished it
            if outcome is None:
                free = set(range(self.workers)) - {other.worker for other in self.running.values()}
                attempt = Attempt(self.file, trial, claim, min(free))
                if self.file.wait == RUN_JSON and submitted(attempt.folder):
                    self._check_unchanged(trial)
                    attempt.rejoin()
                    self.progress.say(f"{trial.name}: was submitted before; waiting for its run.json")
                else:
                    attempt.start()
                self.running[trial.name] = attempt
        except BaseException:
            if attempt is not None:
                attempt.remove()
            raise
        finally:
            if trial.name not in self.running:
                claim.release()
        self._elsewhere.pop(trial.name, None)
        if outcome:
            self._settle(trial, outcome, None)

    def _collect(self) -> None:
        """Take the trials that ended off their slots."""
        for name, attempt in list(self.running.items()):
            outcome = attempt.poll()
            if outcome:
                self.source.hopeless(attempt.trial, attempt.evaluations())  # the last ones, for the pruner
                del self.running[name]
                attempt.close()
                self._settle(attempt.trial, outcome, attempt.seconds)
                self._recount()
                self._write_table()

    def _prune(self) -> None:
        """End trials that the pruner gives up."""
        if time.monotonic() < self._next_prune:
            return
        self._next_prune = time.monotonic() + PRUNE_SECONDS
        for name, attempt in list(self.running.items()):
            if self.source.hopeless(attempt.trial, attempt.evaluations()):
                del self.running[name]
                attempt.ask_to_end()
                attempt.end(time.monotonic() + GRACE_SECONDS)
                attempt.remove()
                self._settle(attempt.trial, Outcome(PRUNED), attempt.seconds)
                attempt.close()  # only now: until the study knows, another process would train it again

    def _settle(self, trial: PlannedTrial, outcome: Outcome, seconds: float | None) -> None:
        self.outcomes[trial.name] = outcome
        self.source.settle(trial, outcome)
        self._elsewhere.pop(trial.name, None)
        self.progress.running = len(self.running) + len(self._elsewhere)
        details = {}
        if outcome.kind == FAILED and seconds is not None:
            folder = self.file.folder(trial)
            details = {f"the end of {os.path.join(folder, 'log.txt')}:": last_lines(folder)}
            self._failures.append(failure_kind(folder, outcome))
        self.progress.ended(trial.name, outcome, seconds, details)

    def _write_table(self) -> None:
        done = sorted((name, outcome.trial) for name, outcome in self.outcomes.items() if outcome.trial is not None)
        write_text(os.path.join(self.file.output, "trials.csv"), to_csv(trial for _, trial in done), shared=True)

    def _end_all(self) -> int:
        """End every training that was started here; returns how many there were."""
        attempts = list(self.running.values())
        deadline = time.monotonic() + GRACE_SECONDS
        for attempt in attempts:
            attempt.ask_to_end()
        for attempt in attempts:
            attempt.end(deadline)
            attempt.remove()
            attempt.close()
        self.running.clear()
        return len(attempts)

    def _alike(self) -> bool:
        """Return whether the first trials all failed in one way, so that no more are started.

        Those that run at that time decide: if one of them ends in another way, the sweep goes on.
        """
        if self.keep_going or any(outcome.kind != FAILED for outcome in self.outcomes.values()):
            return False
        return len(self._failures) >= SAME_FAILURES and len(set(self._failures)) == 1

    def _counted(self) -> str:
        """Return ``"2 finished, 1 failed"``."""
        counts = self.progress.counts
        kinds = [f"{counts[kind]} {kind}" for kind in (FINISHED, DIVERGED, PRUNED, FAILED) if counts[kind]]
        return ", ".join(kinds) or "none ended"

    def _say_interrupted(self, ended: int) -> int:
        if self.file.wait == "command":
            what = f"{ended} running ended and removed, to be trained from the start"
        else:
            what = f"{ended} submitted {'goes' if ended == 1 else 'go'} on"
        print(f"interrupted: of {self.source.total} trials {self._counted()}; {what}", file=sys.stderr)
        again = " (it trains failed ones again)" if self.progress.counts[FAILED] else ""
        print(f"go on with: megatron-patch sweep {self.file.path} --resume{again}", file=sys.stderr)
        return ExitCode.INTERRUPTED

    def _say_hopeless(self) -> int:
        reason = next(outcome.reason for outcome in self.outcomes.values() if outcome.kind == FAILED)
        print(
            f"stopped: the first {len(self._failures)} trials all failed in the same way ({reason}), and the others "
            f"would too; {self.source.total - self.progress.done} were not started",
            file=sys.stderr,
        )
        print(
            f"when it is mended, go on with: megatron-patch sweep {self.file.path} --resume; "
            "--keep-going trains the others all the same",
            file=sys.stderr,
        )
        return ExitCode.FAILED

    def _summary(self) -> int:
        for note in self.source.notes():
            print(note)
        print(f"{self.progress.done} trials: {self._counted()}; table: {os.path.join(self.file.output, 'trials.csv')}")
        failed = sorted(name for name, outcome in self.outcomes.items() if outcome.kind == FAILED)
        for name in failed:
            print(f"failed: {name} ({self.outcomes[name].reason}); see {self.file.output}/trials/{name}/log.txt")
        if failed:
            print(
                f"{len(failed)} failed; --resume trains {'it' if len(failed) == 1 else 'them'} again", file=sys.stderr
            )
        for line in self.ending([o.trial for o in self.outcomes.values() if o.trial is not None]):
            print(line)
        return ExitCode.FAILED if failed or self.progress.done < self.source.total else ExitCode.DONE


def _them(number: int) -> str:
    return "it" if number == 1 else "them"
