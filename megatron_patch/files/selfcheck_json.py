"""selfcheck.json: what `megatron-patch selfcheck` has found, line by line; its words, its writer, its reader."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from megatron_patch.files.whole import as_written, read_json, write_json

SELFCHECK_JSON = "selfcheck.json"
PAGE = "selfcheck.html"


class Judged(StrEnum):
    """How a line stands."""

    PASS = "pass"
    FAIL = "fail"
    SKIPPED = "skipped"
    """It cannot be done here, or was not asked for; `why` names the reason."""
    WAITING = "waiting"
    """The runs it compares have not ended: what an interrupted selfcheck leaves behind."""


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    """Group and what it is about, ``metrics/bf16``."""
    compared: str
    """What is compared with what."""
    judged: Judged
    figure: float | None = None
    """What came out; None where the line says no number."""
    bound: float | None = None
    """The largest figure that passes."""
    why: str = ""
    """What to know of the figure; why it failed or was skipped."""
    seconds: float = 0.0
    """From the start of the first run that it needs to its end."""


@dataclass(frozen=True)
class Selfcheck:
    """All that was found."""

    device: str
    """Name of the GPU, or of the processor."""
    complete: bool
    """Whether every line has been judged."""
    seconds: float
    machine: Mapping[str, Any]
    """Versions and hardware, as `megatron_patch.selfcheck.probe` found them."""
    lines: Sequence[Line]
    series: Mapping[str, Sequence[float]]
    """Losses of each run, by its name, for the page."""

    @property
    def counts(self) -> dict[str, int]:
        """How many lines stand how."""
        return {judged.value: sum(line.judged is judged for line in self.lines) for judged in Judged}

    @property
    def passed(self) -> bool:
        """Whether it is complete, nothing failed and something was checked."""
        return self.complete and not self.counts[Judged.FAIL] and self.counts[Judged.PASS] > 0

    def write(self, folder: str) -> str:
        """Write selfcheck.json into a folder, as a whole, and return its name.

        Raises:
            OSError: it cannot be written.
        """
        path = os.path.join(folder, SELFCHECK_JSON)
        content = {**asdict(self), "counts": self.counts, "passed": self.passed}
        write_json(path, _finite(content))
        return path

    @classmethod
    def read(cls, path: str) -> "Selfcheck":
        """Read selfcheck.json.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not what `write` writes.
        """
        content = read_json(path)
        with as_written():
            lines = [Line(**{**line, "judged": Judged(line["judged"])}) for line in content["lines"]]
            names = ("device", "complete", "seconds", "machine", "series")
            return cls(lines=lines, **{name: content[name] for name in names})


def _finite(value: Any) -> Any:
    """Return `value` with what JSON has no number for as text."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
