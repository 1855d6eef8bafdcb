"""kill -9 of a rank in the middle of anything, then a restart: it ends as an undisturbed run does, to the last bit."""

from pathlib import Path

import pytest

from tests.support.faulty import LAST, SAVED, assert_same_end, die, iterations, start, tracker
from tests.support.pool import Pool
from tests.support.training import Outcome

# What is going on, the rank that is killed (the last one writes the metrics), and the iteration.
CASES = {"step": (0, 5), "save": (1, 2 * SAVED), "alignment": (1, 5)}


@pytest.mark.parametrize("place", CASES)
def test_killed_and_started_again(pool: Pool, tmp_path: Path, whole: tuple[Path, Outcome], place: str) -> None:
    rank, iteration = CASES[place]
    die(pool, tmp_path, place, rank, iteration)
    assert tracker(tmp_path) == SAVED
    # The fault was where it should be.
    text = (tmp_path / "transfer" / "alignment.jsonl").read_text()
    if place == "alignment":
        assert not text.endswith("\n")
        # What a step has measured is written within the next.
        assert f'"iteration": {iteration - 1},' in text.splitlines()[-2]
    else:
        assert iterations(tmp_path)[-1] == (iteration - 1 if place == "step" else iteration)
    checkpoint = tmp_path / f"iter_{2 * SAVED:07d}"
    if place == "save":
        complete = whole[0] / checkpoint.name / "__1_0.distcp"
        assert 0 < (checkpoint / "__1_0.distcp").stat().st_size < complete.stat().st_size
        assert not (checkpoint / ".metadata").exists()
    assert_same_end(start(pool, tmp_path), tmp_path, whole, LAST - SAVED)


def test_killed_again_and_again(pool: Pool, tmp_path: Path, whole: tuple[Path, Outcome]) -> None:
    """In every other place, one after the other in one run: each restart goes on from the last complete checkpoint."""
    for place, rank, iteration, saved in (
        ("step", 1, 1, None),
        ("save", 0, SAVED, None),
        ("equilibrium", 1, 5, SAVED),
        ("record", 1, 4, SAVED),
        ("tracker", 0, 2 * SAVED, SAVED),
    ):
        die(pool, tmp_path, place, rank, iteration)
        assert tracker(tmp_path) == saved
        assert (tmp_path / "transfer" / "run.json.tmp").exists() == (place == "record")
    assert (tmp_path / f"iter_{2 * SAVED:07d}" / ".metadata").exists(), "complete, but for the word of it"
    assert_same_end(start(pool, tmp_path), tmp_path, whole, LAST - SAVED)
