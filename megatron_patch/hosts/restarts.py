"""Start a run again after a crash, from its last checkpoint: so many times, and only while it gets further."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_patch.errors import ConfigError, ExitCode

WAITS = (10.0, 20.0, 40.0, 80.0, 160.0, 300.0)
"""Seconds before the first restart, the second ...; the last one for all others."""
FUTILE = 2
"""Attempts in a row without a new checkpoint after which it is given up."""
TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's, in --save: the last whole checkpoint."""


@dataclass(frozen=True)
class Ended:
    """How an attempt ended."""

    code: int
    """As of the script."""
    diverged: bool
    """Whether its run.json says so."""
    checkpoint: str | None
    """What the tracker file in --save said afterwards; None if there was none."""


def check_restarts(restarts: int, save: str | None, load: str | None) -> None:
    """Raise ConfigError where a restart would begin anew."""
    if restarts < 0:
        raise ConfigError("--restarts", restarts, "an integer >= 0", "give how many times a crash may be gone on from")
    if restarts and (save is None or save != load):
        got = f"{restarts} with --save {save or 'not given'} and --load {load or 'not given'}"
        raise ConfigError("--restarts", got, "--load of the folder that --save writes to", "give both the same folder")


def supervised(
    attempt: Callable[[], Ended],
    restarts: int,
    say: Callable[[str], None],
    wait: Callable[[float], None],
) -> int:
    """Make attempts until one ends well, or another would be no use; return the last one's exit code.

    A user's mistake (exit code 2 of the first attempt), a divergence and a signal are not gone on from. After a crash
    a host may be away for a while: that an attempt cannot be started counts as one without a new checkpoint.

    Args:
        attempt: starts the run and sees it to its end; raises ConfigError where it cannot be started.
        restarts: how many times at most.
        say: prints a line.
        wait: waits for so many seconds.
    """
    checkpoint: str | None = None
    futile = 0
    waits = _waits()
    for number in range(restarts + 1):
        try:
            ended = attempt()
        except ConfigError as error:
            if number == 0:
                raise
            say(f"restart {number} of {restarts}: {error}")
            ended = Ended(ExitCode.MISTAKE, False, checkpoint)
        else:
            if why := _over(ended):
                if restarts and ended.code != ExitCode.DONE:
                    say(f"not restarted: {why}")
                return ended.code
        futile = futile + 1 if ended.checkpoint == checkpoint else 0
        checkpoint = ended.checkpoint
        if futile >= FUTILE:
            last = checkpoint or "none"
            say(f"not restarted: {futile} attempts in a row made no new checkpoint (the last one: {last})")
            return ended.code
        if number == restarts:
            break
        seconds = next(waits)
        say(f"restart {number + 1} of {restarts} in {seconds:g} s, from checkpoint {checkpoint or 'none: the start'}")
        try:
            wait(seconds)
        except KeyboardInterrupt:
            say("ended while it waited to restart; nothing is running")
            return ExitCode.INTERRUPTED
    if restarts:
        say(f"not restarted: {restarts} restarts were made")
    return ended.code


def _over(ended: Ended) -> str:
    """Return why an attempt is not to be repeated; empty if it is."""
    if ended.code == ExitCode.DONE:
        return "it is done"
    if ended.diverged:
        return "the run diverged"
    if ended.code == ExitCode.MISTAKE:
        return "a mistake that only you can mend"
    if ended.code in (ExitCode.INTERRUPTED, 128 + signal.SIGTERM, 128 + signal.SIGHUP):
        return "it was asked to end"
    return ""


def _waits() -> Iterator[float]:
    yield from WAITS
    while True:
        yield WAITS[-1]
