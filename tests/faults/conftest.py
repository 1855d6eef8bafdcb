"""What the tests of faults share."""

from pathlib import Path

import pytest

from tests.support.faulty import LAST, iterations, metrics, start, tracker
from tests.support.pool import Pool
from tests.support.training import Outcome


@pytest.fixture(scope="session")
def whole(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The folder and the outcome of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = start(pool, folder)
    assert len(set(outcome.losses)) == LAST
    assert iterations(folder) == list(range(1, LAST + 1))
    assert tracker(folder) == LAST
    assert metrics(folder, "run.json")["status"] == "finished"
    return folder, outcome
