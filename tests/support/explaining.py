"""``explain`` inside a worker of the pool."""

import contextlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.support.pool import Pool


@dataclass
class Ended:
    """How one ``explain`` ended."""

    code: Any
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        found: dict[str, Any] = json.loads(self.out)
        return found


def explain_all(commands: Sequence[Sequence[str]], cwd: str = "") -> list[Ended]:
    """In a worker: several commands one after another in one process, which must leave nothing behind."""
    from megatron_patch.entry.explain import explain

    if cwd:
        os.chdir(cwd)
    ended = []
    for command in commands:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                explain(command)
            except SystemExit as stop:
                code = stop.code  # type: ignore[assignment]
        ended.append(Ended(code, out.getvalue(), err.getvalue()))
    return ended


def explained(pool: Pool, commands: Sequence[Sequence[str]], cwd: str = "") -> list[Ended]:
    found: list[Ended] = pool.run(explain_all, distributed=False, commands=commands, cwd=cwd)[0]
    return found
