"""Starts the runs, each in processes of its own with a time limit, and keeps what has been found on disk."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_patch.errors import ExitCode
from megatron_patch.files.whole import write_json
from megatron_patch.selfcheck import observed
from megatron_patch.selfcheck.runs import Spec

SHOWN = 300
"""Characters of a failed run's last words."""
GRACE = 5.0
"""Seconds from a polite end to a hard one."""

Result = dict[str, Any]


@dataclass
class Running:
    """The processes of a run."""

    spec: Spec
    folder: str
    began: float
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)


class Conductor:
    """Makes runs, as many beside each other as there is room for.

    Args:
        folder: absolute; a run gets ``runs/NAME`` in it.
        specs: the runs, the most important first.
        script: the Megatron script that is trained with, unless a run names its own.
        corpus: prefix of the dataset.
        slots: how many ranks may be busy at a time.
        ends: `time.monotonic` at which everything is over.
        program: what is started for each rank, before the flags.
    """

    def __init__(
        self,
        folder: str,
        specs: Sequence[Spec],
        script: str,
        corpus: str,
        slots: int,
        ends: float,
        program: Sequence[str] = (sys.executable, "-m", "megatron_patch", "run", observed.__file__),
    ) -> None:
        self._program = program
        self._folder, self._script, self._corpus, self._slots = folder, script, corpus, slots
        self._waiting = list(specs)
        self._ends = ends
        self._kept = sum(spec.limit for spec in specs if spec.alone)
        self._running: list[Running] = []
        self.results: dict[str, Result] = {}
        """By name of the run; one with `error` has failed."""

    def run(self, each: Callable[[], None]) -> None:
        """Make all runs, and call `each` whenever one has ended."""
        try:
            while self._waiting or self._running:
                before = len(self.results)
                self._start()
                self._poll()
                if len(self.results) > before:
                    each()
                else:
                    time.sleep(0.05)
        finally:
            for running in self._running:
                end(running.processes)

    def _start(self) -> None:
        now = time.monotonic()
        for spec in list(self._waiting):
            busy = sum(running.spec.ranks for running in self._running)
            others = any(running.spec.alone for running in self._running)
            if spec.after and spec.after not in self.results:
                continue
            last = self._ends - (0 if spec.alone else min(self._kept, (self._ends - now) / 2))
            if now >= last:
                self._give_up(spec, "not started: the time for the whole was used up")
            elif spec.after and "error" in self.results[spec.after]:
                self._give_up(spec, f"not started: it goes on from {spec.after}, which failed")
            elif others or (busy and (spec.alone or busy + spec.ranks > self._slots)):
                if spec.alone:
                    continue
                break
            elif spec.alone and len(self._waiting) > 1 and any(not other.alone for other in self._waiting):
                continue
            else:
                self._waiting.remove(spec)
                try:
                    self._running.append(self._launch(spec))
                except Exception as error:
                    self.results[spec.name] = failed(f"could not be started: {error!r}")

    def _give_up(self, spec: Spec, why: str) -> None:
        self._waiting.remove(spec)
        self.results[spec.name] = failed(why)

    def _launch(self, spec: Spec) -> Running:
        folder = os.path.join(self._folder, "runs", spec.name)
        os.makedirs(folder)
        watched = {
            "mode": spec.mode,
            "result": os.path.join(folder, "seen"),
            "steps": spec.size.steps,
            "exact": list(spec.exact),
            "script": spec.script or self._script,
            "trace": os.path.join(self._folder, "trace.json.gz"),
        }
        write_json(os.path.join(folder, "spec.json"), watched)
        places = {"folder": folder, "runs": os.path.join(self._folder, "runs")}
        flags = [flag.format(**places) for flag in spec.flags]
        flags += ["--data-path", self._corpus, "--data-cache-path", os.path.join(folder, "cache")]
        flags += ["--metrics-dir", os.path.join(folder, "metrics")]
        flags += ["--cpu"] if spec.device == "cpu" else []
        if spec.mode == "train":
            flags += ["--no-report", "--log-interval", "1"]
        command = [*self._program, *flags]
        running = Running(spec, folder, time.monotonic())
        port = free_port()
        for rank in range(spec.ranks):
            with open(os.path.join(folder, f"log.{rank}.txt"), "wb") as log:
                running.processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=self._environment(spec, rank, port, folder),
                        start_new_session=True,
                    )
                )
        return running

    def _environment(self, spec: Spec, rank: int, port: int, folder: str) -> dict[str, str]:
        cores = len(os.sched_getaffinity(0))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
        environment |= {
            observed.SPEC: os.path.join(folder, "spec.json"),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(spec.ranks),
            "LOCAL_WORLD_SIZE": str(spec.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            # Small matrices: on a busy machine threads that wait for each other cost more than they do.
            "OMP_NUM_THREADS": "1" if cores < 8 else "4",
            "PYTHONUNBUFFERED": "1",
            **spec.environment,
        }
        # What is imported here is imported there, also from a checkout that is not installed.
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(observed.__file__))))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
        if spec.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return environment

    def _poll(self) -> None:
        now = time.monotonic()
        for running in list(self._running):
            codes = [process.poll() for process in running.processes]
            spent = now - running.began
            if spent > running.spec.limit or now > self._ends:
                end(running.processes)
                limit = f"{running.spec.limit:.0f} s" if spent > running.spec.limit else "the time for the whole"
                result = failed(f"not done within {limit}; {last_words(running.folder, codes)}")
            elif None in codes and not any(codes):
                continue
            else:
                if None in codes:  # one rank has failed, and the others wait for it
                    end(running.processes)
                result = self._collect(running, codes)
            self._running.remove(running)
            self.results[running.spec.name] = result | {"seconds": spent}

    def _collect(self, running: Running, codes: Sequence[int | None]) -> Result:
        if running.spec.mode == "refusal":
            return {"code": codes[0], "said": last_words(running.folder, codes)}
        if any(codes):
            return failed(last_words(running.folder, codes))
        try:
            ranks = []
            for rank in range(running.spec.ranks):
                with open(os.path.join(running.folder, f"seen.{rank}.json"), encoding="utf-8") as file:
                    ranks.append(json.load(file))
            merged = merge(ranks)
            merged["lines"] = read_measured(os.path.join(running.folder, "metrics"))
        except (OSError, ValueError) as error:
            return failed(f"ended without its results: {error}")
        return merged


def failed(why: str) -> Result:
    """Return the result of a run that gave none."""
    return {"error": why, "seconds": 0.0}


def merge(ranks: Sequence[Result]) -> Result:
    """Return what the ranks of a run have seen together; where several saw a thing, the first counts."""
    merged: Result = {}
    for seen in ranks:
        for key, value in seen.items():
            if isinstance(value, dict) and isinstance(merged.get(key), dict):
                merged[key] = {**value, **merged[key]}
            else:
                merged.setdefault(key, value)
    return merged


def read_measured(folder: str) -> dict[str, dict[str, Any]]:
    """Return the lines of alignment.jsonl by ``iteration layer``; none where there is no such file."""
    path = os.path.join(folder, "alignment.jsonl")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return {f"{line['iteration']} {line['layer']}": line for line in lines}


def last_words(folder: str, codes: Sequence[int | None]) -> str:
    """Return how a run ended, and the last line of the rank that is to blame for it."""
    guilty = next((rank for rank, code in enumerate(codes) if code), 0)
    code = codes[guilty] if guilty < len(codes) else None
    said = ""
    try:
        with open(os.path.join(folder, f"log.{guilty}.txt"), encoding="utf-8", errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
        errors = [line for line in lines if line.startswith("error: ") or "Error" in line.partition(":")[0]]
        said = (errors or lines or [""])[-1][:SHOWN]
    except OSError:
        pass
    how = "still running" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}: {said}" if said else how


def end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End processes with all that they have started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                continue
        ends = time.monotonic() + GRACE
        while time.monotonic() < ends and any(process.poll() is None for process in processes):
            time.sleep(0.02)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ask(module: str, *arguments: str, limit: float, environment: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Run a module of this package as a program; return what it printed, and in one line why it failed, or nothing."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(observed.__file__))))
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, **(environment or {}), "PYTHONPATH": paths}
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        end([process])  # type: ignore[list-item]
        return "", f"{module}: not done within {limit:.0f} s"
    finally:
        if process.poll() is None:
            end([process])  # type: ignore[list-item]
    if process.returncode != ExitCode.DONE:
        words = err.strip().splitlines() or ["no word"]
        return out, f"{module}: exit code {process.returncode}: {words[-1][:SHOWN]}"
    return out, ""
