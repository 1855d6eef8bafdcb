"""One pool of worker processes for every distributed test: Megatron is imported once, not once per test and rank.

How to use it, in a test module anywhere below `tests/`:

    def job(value: int) -> int:  # at module level, so that a worker can import it; arguments and result are pickled
        import torch

        total = torch.tensor(value + torch.distributed.get_rank())
        torch.distributed.all_reduce(total)
        return int(total)


    def test_sum(pool: Pool) -> None:  # the fixture of tests/conftest.py
        assert pool.run(job, ranks=2, value=3) == [7, 7]

`pool.run` returns what the ranks returned, rank by rank. A rank that raises makes the test fail with a `RankFailure`
that names the rank and shows its traceback and the end of what it printed. A job that outlives `timeout` is killed,
and the Python stacks of its ranks are shown. What the ranks of the last job printed is in `pool.printed`.

How it works: a template process activates the CPU platform and imports torch and Megatron, once. Each job forks its
ranks from the template. So a rank starts in a fraction of a second with every import done and, more important, in a
fresh state: no argument, process group, random state, hook or cache of one test can leak into another, whatever a
test patches or breaks. A job may therefore assign to any module and need not clean up.

In a job: torch.distributed is initialised over gloo unless `distributed=False`; RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT are set as a launcher sets them. To train a small GPT with Megatron's own trainer in a
job, see `tests/support/training.py`.
"""

import argparse
import contextlib
import faulthandler
import functools
import importlib
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HANGS = 1800.0  # seconds after which a job hangs, however busy the machine
GRACE = 10.0  # seconds the other ranks get to fail by themselves, and to say how, once one has failed
STARTUP = 1800.0  # seconds the template may take to import Megatron on a busy machine
SHOWN = 4000  # characters of a rank's output in a failure message
# Ends every failure's text: the two functions of Megatron that are not its own in a job.
CHANGED = (
    "(the pool's template replaced two functions of Megatron: get_write_results_queue forks instead of spawning, and "
    "ArgumentGroupFactory._get_field_docstrings remembers; tests/launch/test_pretrain.py trains without both)"
)
# What the trainer imports at the start and, left to itself, here and there in the course of a run.
PRELOADED = (
    "megatron.training.training",
    "megatron.training.checkpointing",
    "megatron.core.models.gpt",
    "megatron.core.models.mimo",
    "megatron.core.tokenizers.text",  # and transformers with it: most of what a short job took
    "megatron_patch.kernels.norms",
    "megatron_patch.upstream.datasets",
    "megatron_patch.upstream.patch",
    "torch.utils.tensorboard",
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # the ranks share few cores; and no thread pool may exist when the template forks
    "OPENBLAS_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",  # independent of how this machine resolves its own name
    "PYTHONWARNINGS": "ignore",  # Megatron misses a dozen GPU libraries aloud
}


@dataclass(frozen=True)
class Job:
    """What is sent to the template; `call` is the pickled (function, keyword arguments)."""

    call: bytes
    ranks: int
    timeout: float
    distributed: bool
    env: dict[str, str]


@dataclass
class Report:
    """What the template sends back."""

    values: dict[int, bytes] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)  # in the order in which the ranks failed
    printed: list[str] = field(default_factory=list)
    timed_out: bool = False


class RankFailure(Exception):
    """A rank of a job raised, died or did not finish in time. `errors` maps each failed rank to its traceback."""

    def __init__(self, job: Job, report: Report) -> None:
        self.errors = dict(report.errors)
        rank, text = next(iter(self.errors.items()))
        what = f"was not done after {job.timeout:g} s" if report.timed_out else "failed"
        lines = [f"rank {rank} of {job.ranks} {what}", text.rstrip()]
        others = [f"rank {other}: {error.strip().splitlines()[-1]}" for other, error in self.errors.items()]
        lines += ["then", *others[1:]] if len(others) > 1 else []
        for shown in list(self.errors) if report.timed_out else [rank]:
            lines += [f"--- the end of what rank {shown} printed ---", report.printed[shown][-SHOWN:].rstrip()]
        super().__init__("\n".join([*lines, CHANGED]))


class Pool:
    """The test session's side of the pool. Starts the template with the first job.

    Args:
        more: modules that the template imports as well.
    """

    def __init__(self, *more: str) -> None:
        self._more = more
        self.printed: list[str] = []
        self._template: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def run(
        self,
        function: Callable[..., Any],
        *,
        ranks: int = 1,
        timeout: float = HANGS,
        distributed: bool = True,
        env: dict[str, str] | None = None,
        **arguments: Any,
    ) -> list[Any]:
        """Calls `function(**arguments)` on `ranks` processes and returns their values, rank by rank.

        Args:
            function: a module-level function of a module below `tests/`, or of the package.
            ranks: world size.
            timeout: seconds after which the job is killed; the default only ends what hangs.
            distributed: whether torch.distributed is initialised before the call.
            env: environment variables for the ranks.

        Raises:
            RankFailure: a rank raised, died or hung.
        """
        job = Job(pickle.dumps((function, arguments)), ranks, timeout, distributed, env or {})
        connection = self._start()
        try:
            connection.send(job)
            if not connection.poll(timeout + 60.0):
                raise TimeoutError(f"the pool did not answer {timeout + 60.0:g} s after it was given {function}")
            report: Report = connection.recv()
        except BaseException:  # the template died or hangs, or the test was interrupted: the next job gets a new one
            self.close()
            raise
        self.printed = report.printed
        if report.errors:
            raise RankFailure(job, report)
        return [pickle.loads(report.values[rank]) for rank in range(ranks)]  # noqa: S301 - our own workers wrote it

    def close(self) -> None:
        """Ends the template and with it every rank."""
        if self._connection is not None:
            self._connection.close()
        if self._template is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._template.pid, signal.SIGKILL)  # the template leads a process group of its own
            self._template.wait()
        self._template = self._connection = None

    def _start(self) -> Connection:
        if self._connection is not None:
            return self._connection
        ours, theirs = Pipe()
        self._template = subprocess.Popen(
            [sys.executable, "-m", "tests.support.pool", str(theirs.fileno()), *self._more],
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env=os.environ | ENVIRONMENT,
        )
        theirs.close()
        self._connection = ours
        with contextlib.suppress(EOFError):
            if ours.poll(STARTUP) and ours.recv() == "ready":
                return ours
        self.close()
        raise RuntimeError("the pool's template process did not start; its output is on standard error")


# --- the template process --------------------------------------------------------------------------------------------


def _serve(connection: Connection, more: Sequence[str]) -> None:
    """Imports everything once, then answers each job with a report until the test session closes the connection."""
    from megatron_patch.upstream.cpu.platform import activate

    activate()
    for module in (*PRELOADED, *more):
        importlib.import_module(module)
    # Megatron's checkpoint writer spawns a process for its queue, which imports torch and Megatron again, for each job.
    writer = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    writer.get_write_results_queue = functools.partial(writer.get_write_results_queue, "fork")  # type: ignore[attr-defined]
    _remember_help_texts()
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(_run(job, connection))


def _remember_help_texts() -> None:
    """Reads the help of Megatron's flags from the source of its config classes once: half the time of its parser."""
    from megatron.training import arguments
    from megatron.training.argument_utils import ArgumentGroupFactory

    read = ArgumentGroupFactory._get_field_docstrings
    remembered = functools.cache(functools.partial(read, object.__new__(ArgumentGroupFactory)))
    ArgumentGroupFactory._get_field_docstrings = lambda self, cls: remembered(cls)
    arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def _run(job: Job, connection: Connection) -> Report:
    """Forks the ranks of a job and gathers their values, or their ends."""
    report = Report()
    try:
        pickle.loads(job.call)  # noqa: S301 - imports the test's module here, so that the ranks find it imported
    except Exception:
        report.errors[0] = traceback.format_exc()
        report.printed = [""] * job.ranks
        return report
    folder = Path(tempfile.mkdtemp(prefix="pool-"))
    port = _free_port()
    pids: dict[int, int] = {}
    pending: dict[Connection, int] = {}
    for rank in range(job.ranks):
        receiver, sender = Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            _rank(job, rank, port, folder, sender)  # does not return
        sender.close()
        pids[rank] = pid
        pending[receiver] = rank
    deadline = time.monotonic() + job.timeout
    while pending:
        ready = wait([connection, *pending], timeout=max(0.0, deadline - time.monotonic()))
        if connection in ready:  # only the session's end speaks here: it died or was interrupted
            os.killpg(0, signal.SIGKILL)
        if not ready:
            if not report.errors:
                report.timed_out = True
                for rank in pending.values():
                    report.errors[rank] = "no traceback: see its stack below"
                    os.kill(pids[rank], signal.SIGUSR1)  # faulthandler prints the stack
                _wait_for_stacks([folder / f"rank{rank}" for rank in pending.values()])
            break
        for receiver in [r for r in ready if isinstance(r, Connection)]:
            rank = pending.pop(receiver)
            try:
                done, content = receiver.recv()
            except EOFError:
                done, content = False, "the process died without a Python exception"
            if done:
                report.values[rank] = content
            else:
                if not report.errors:
                    deadline = min(deadline, time.monotonic() + GRACE)
                report.errors[rank] = content
    for receiver, rank in pending.items():
        os.kill(pids[rank], signal.SIGKILL)
        receiver.close()
    for rank, pid in pids.items():
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if rank in report.errors and report.errors[rank].startswith("the process died"):
            report.errors[rank] += f" (exit code {code})"
    report.printed = [_text(folder / f"rank{rank}") for rank in range(job.ranks)]
    shutil.rmtree(folder, ignore_errors=True)
    return report


def _text(path: Path) -> str:
    """What a rank printed; nothing where it was killed before it opened its file."""
    return path.read_text(errors="replace") if path.exists() else ""


def _wait_for_stacks(files: list[Path]) -> None:
    """Waits until faulthandler has printed into every file, which a busy machine may take its time for."""
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and not all("most recent call first" in _text(file) for file in files):
        time.sleep(0.05)
    time.sleep(0.5)  # for the rest of the stack


def _rank(job: Job, rank: int, port: int, folder: Path, sender: Connection) -> None:
    """The life of one rank. Ends with `os._exit`: nothing of the template's may run at the exit of a child."""
    try:
        file = os.open(folder / f"rank{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(job.ranks), LOCAL_RANK=str(rank), **job.env)
        os.environ.update(LOCAL_WORLD_SIZE=str(job.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        import torch

        if job.distributed:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=job.ranks,
                timeout=timedelta(seconds=job.timeout),
            )
        function, arguments = pickle.loads(job.call)  # noqa: S301 - the test session wrote it
        answer: tuple[bool, bytes | str] = (True, pickle.dumps(function(**arguments)))
    except BaseException:  # SystemExit is a failure as well: Megatron exits on errors
        answer = (False, traceback.format_exc())
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
        sender.send(answer)
        sender.close()
    # A rank that leaves early resets the connections of the others: wait for them, unless something went wrong.
    if answer[0] and job.distributed:
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()
    for child in multiprocessing.active_children():  # such as the checkpoint writer's queue, which would stay
        child.kill()
        child.join()
    os._exit(0 if answer[0] else 1)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


if __name__ == "__main__":
    from tests.support import pool  # the pickles name tests.support.pool.Job, not __main__.Job

    pool._serve(Connection(int(sys.argv[1])), sys.argv[2:])
