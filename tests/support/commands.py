"""Whole commands inside a worker of the pool, where Megatron is loaded already."""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.entry import run as run_module


@dataclass
class Ended:
    """How a command ended: its exit code, the exception that came through, and what it printed."""

    code: Any
    error: str
    out: str
    err: str


def commands(argvs: Sequence[Sequence[str]], cwd: str, environment: dict[str, str] | None = None) -> list[Ended]:
    """In a worker: what each of several ``python -m megatron_patch run ...`` does, in a process of its own."""
    import pickle

    os.chdir(cwd)
    os.environ.update(environment or {})
    ended = []
    for argv in argvs:
        reader, writer = os.pipe()
        if os.fork() == 0:
            out, err, code, error = io.StringIO(), io.StringIO(), 0, ""
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    run_module.run(argv)
                except SystemExit as stop:
                    code = stop.code
                except BaseException as other:
                    error = f"{type(other).__module__}.{type(other).__name__}: {other}"
                    sys.excepthook(type(other), other, other.__traceback__)  # as python does where nobody catches it
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(Ended(code, error, out.getvalue(), err.getvalue()), pipe)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            ended.append(pickle.load(pipe))  # noqa: S301 - our own child wrote it
        os.wait()
    return ended
