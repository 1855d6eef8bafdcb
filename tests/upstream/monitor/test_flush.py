"""What was measured is written one step later, and still before whatever might be the last thing a run does."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.monitored import Monitored, read_lines
from tests.support.pool import Pool
from tests.support.reference import Model
from tests.support.training import TINY, Run, train

MODEL = Model(layers=1)


@dataclass
class Watching(Monitored):
    """Notes which iterations are in the file right after each step."""

    written: dict[int, list[int]] = field(default_factory=dict)
    saving: bool = False

    def stepped(self, run: Run, iteration: int, losses: dict[str, float]) -> None:
        if self.saving:
            self.monitor.flush()  # what the scheduler does when Megatron asks it for its state
        path = Path(self.directory) / "alignment.jsonl"
        self.written[iteration] = sorted({i for i, _ in read_lines(self.directory)}) if path.exists() else []

    def result(self, run: Run) -> Any:
        return self.written


def test_lines_are_written_by_the_next_step_and_at_the_end(pool: Pool, tmp_path: Path) -> None:
    argv = [*TINY, *MODEL.flags()]
    late = pool.run(train, argv=argv, steps=4, hooks=Watching(str(tmp_path / "late"), interval=2, spectral=3))[0].extra
    assert late == {1: [], 2: [], 3: [2], 4: [2, 3]}
    now = pool.run(
        train, argv=argv, steps=4, hooks=Watching(str(tmp_path / "now"), interval=2, spectral=3, saving=True)
    )[0].extra
    assert now == {1: [], 2: [2], 3: [2, 3], 4: [2, 3, 4]}
    for name in ("alignment.jsonl", "equilibrium.jsonl", "sublayers.jsonl"):
        assert (tmp_path / "late" / name).read_bytes() == (tmp_path / "now" / name).read_bytes(), name
    assert {iteration for iteration, _ in read_lines(tmp_path / "late")} == {2, 3, 4}
