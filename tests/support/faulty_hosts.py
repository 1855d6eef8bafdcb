"""A run across two hosts that something happens to, and what it left behind.

Ranks are stand-ins unless asked otherwise: a small program that exchanges a byte a step as training would, so that a
fault takes seconds of a processor instead of a minute. ssh, pdsh, sshd and DeepSpeed's launcher are the real ones.
"""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.two_hosts import LAUNCH, PATIENCE, TINY, Host, TwoHosts, environment, wait_for

STAND_IN = r'''
"""A rank: two of them send each other a byte a step."""
import json, os, socket, subprocess, sys, time

def value(flag, default):
    return sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else default

rank, save, steps = int(os.environ["RANK"]), value("--save", "save"), int(value("--train-iters", "6"))
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
os.makedirs(save + "/transfer", exist_ok=True)

def record(status, iteration):
    if rank:
        content = {"status": status, "job": os.environ.get("MEGATRON_PATCH_JOB"), "iteration": iteration}
        with open(save + "/transfer/run.json", "w") as file:
            json.dump(content, file)

if value("--fails-on", "") == str(rank):
    raise ValueError("no such data")
# Megatron's checkpoint writer has such a child, and it holds the rank's output
helper = subprocess.Popen(["sleep", "1000000"])
if rank == 0:
    with socket.create_server(address) as server:
        peer, _ = server.accept()
else:
    while True:
        try:
            peer = socket.create_connection(address)
            break
        except OSError:
            time.sleep(0.1)
peer.settimeout(float(value("--distributed-timeout-minutes", "10")) * 60)
record("running", 0)
for step in range(steps):
    try:
        peer.sendall(b"x")
        received = peer.recv(1)
    except TimeoutError:
        raise RuntimeError("Timed out waiting 1000ms for recv operation") from None
    except OSError as error:
        raise RuntimeError(f"Connection closed by peer: {error}") from None
    if not received:
        raise RuntimeError("Connection closed by peer")
    print(" iteration", step + 1, flush=True)
    time.sleep(0.05)
if not os.path.exists("unfinished"):
    record("finished", steps)
helper.kill()
'''
ENDLESS = ["--train-iters", "1000000"]


class Start:
    """The script, started on nodea.

    Args:
        hosts: the pair.
        folder: to start in, on the shared file system.
        arguments: of the script, after hostfile and config.
        real: Megatron trains, not the stand-in.
    """

    def __init__(self, hosts: TwoHosts, folder: Path, *arguments: str, real: bool = False, **more: str) -> None:
        self.hosts, self._folder = hosts, folder
        (folder / "tiny.yaml").write_text(TINY)
        if not real:
            # Ranks look in the working directory first, as DeepSpeed puts it.
            package = folder / "megatron_patch"
            package.mkdir(exist_ok=True)
            (package / "__init__.py").touch()
            (package / "__main__.py").write_text(STAND_IN)
        number = len(list(folder.glob("out*")))
        self.out, self.err = folder / f"out{number}", folder / f"err{number}"
        words = ["--hostfile", str(hosts.hostfile), "--config", "tiny.yaml", "--tensor-model-parallel-size", "2"]
        self.process = hosts.a.popen(
            *(str(LAUNCH / "pretrain_multinode.sh"), *words, *arguments),
            cwd=folder,
            env=dict(environment(**more)),
            stdout=self.out.open("wb"),
            stderr=self.err.open("wb"),
        )
        self.happened = time.monotonic()

    @property
    def output(self) -> str:
        """All that was printed."""
        return self.out.read_text(errors="replace") + self.err.read_text(errors="replace")

    @property
    def last(self) -> str:
        """The last line on stderr."""
        return (self.err.read_text(errors="replace").splitlines() or [""])[-1]

    def trains(self, lines: int = 4) -> "Start":
        """Wait until both ranks are at work."""
        return self.until(lambda: len(re.findall(r" iteration +\d", self.output)) >= lines)

    def until(self, condition: Callable[[], bool]) -> "Start":
        """Wait for a condition; the run must not end before."""

        def done() -> bool:
            assert self.process.poll() is None, self.output[-3000:]
            return condition()

        wait_for(done, "training", lambda: self.output[-3000:])
        self.happened = time.monotonic()
        return self

    def pid(self, what: str, host: Host | None = None) -> int:
        """A process of the run: rank or launcher on `host`; runner, pdsh or script on nodea."""
        for pid, words, env in (host or self.hosts.a).processes():
            job = "MEGATRON_PATCH_JOB" in env
            found = {
                "rank": job and "RANK" in env and "megatron_patch run" in words,
                "launcher": job and "RANK" not in env and "deepspeed.launcher.launch" in words,
                "runner": not job and "bin/deepspeed " in words and "supervise" not in words,
                "pdsh": words.startswith("pdsh "),
                "script": "supervise.py" in words,
                "agent": "hosts.agent" in words and os.path.basename(words.split()[0]).startswith("python"),
            }[what]
            if found:
                return pid
        raise AssertionError(f"no {what}: {[words for _, words, _ in (host or self.hosts.a).processes()]}")

    def kill(self, what: str, host: Host | None = None, number: int = signal.SIGKILL) -> "Start":
        """Send a signal; the clock runs from here."""
        os.kill(self.pid(what, host), number)
        self.happened = time.monotonic()
        return self

    def ends(self) -> int:
        """Wait for the end and return the exit code, having said how long it took."""
        code = self.process.wait(timeout=PATIENCE)
        self.seconds = time.monotonic() - self.happened
        print(f"ended after {self.seconds:.1f} s with {code}: {self.last}")
        return code

    def clean(self) -> None:
        """Wait until nothing of any job is left on either host, nor of ssh and pdsh on the launching one."""

        def left() -> list[str]:
            return [
                f"{host.name}: {words}"
                for host in self.hosts.both
                for _, words, env in host.processes()
                if "MEGATRON_PATCH_JOB" in env or re.match(r"pdsh |ssh |\S*python", words)
            ]

        wait_for(lambda: not left(), "the end of all processes", lambda: "\n".join(left()))
        print(f"nothing left after {time.monotonic() - self.happened:.1f} s")
