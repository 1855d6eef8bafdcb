"""SIGTERM with --exit-signal-handler: the run saves, says that it was stopped, and goes on later."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.faulty import LAST, assert_same_records, iterations, metrics, start, tracker
from tests.support.monitored import read_lines
from tests.support.pool import Pool
from tests.support.training import Outcome, Patched, Run

STOPPED = 5  # not one of the iterations after which a checkpoint is due


@dataclass
class Waiting(Patched):
    """Says which process it is in the given step, and waits there until it has got the signal."""

    folder: Path

    def stepped(self, run: Run, iteration: int, losses: dict[str, float]) -> None:
        if iteration == STOPPED:
            (self.folder / f"{os.getpid()}.pid").touch()
            deadline = time.monotonic() + 1800
            while not (self.folder / "sent").exists() and time.monotonic() < deadline:
                time.sleep(0.02)


def terminate(folder: Path) -> None:
    """Send SIGTERM to every rank that waits, as a launcher does when the job's time is up."""
    deadline = time.monotonic() + 1800
    while len(found := list(folder.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    for path in found:
        os.kill(int(path.stem), signal.SIGTERM)
    (folder / "sent").touch()


def test_stopped_and_started_again(pool: Pool, tmp_path: Path, whole: tuple[Path, Outcome]) -> None:
    place = tmp_path / "signals"
    place.mkdir()
    sender = threading.Thread(target=terminate, args=(place,))
    sender.start()
    stopped = start(pool, tmp_path, "--exit-signal-handler", hooks=Waiting(place))
    sender.join()
    assert len(stopped.losses) == STOPPED
    assert tracker(tmp_path) == STOPPED
    assert metrics(tmp_path, "run.json")["status"] == "stopped"
    assert metrics(tmp_path, "run.json")["iteration"] == STOPPED
    assert iterations(tmp_path)[-1] == STOPPED
    resumed = start(pool, tmp_path)
    there, undisturbed = whole
    assert resumed.losses == undisturbed.losses[STOPPED:]
    assert len(resumed.losses) == LAST - STOPPED
    assert resumed.checksums == undisturbed.checksums
    assert_same_records(tmp_path, there)
    for name in ("alignment", "equilibrium", "sublayers"):
        assert_same_lines(tmp_path, there, name)


def assert_same_lines(folder: Path, there: Path, name: str) -> None:
    """To the last bit, singular values too: nothing is kept between measurements."""
    mine, theirs = (read_lines(place / "transfer", name) for place in (folder, there))
    assert mine == theirs
