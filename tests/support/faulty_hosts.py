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
"""A rank: two of them send each other a byte a step, and beat as Megatron's training does."""
import json, os, socket, subprocess, sys, time
from megatron_patch.hosts.heartbeat import BETWEEN, CHECKPOINT, STARTING, STEP, Heart

def value(flag, default):
    return sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else default

# A place that looks like that of a collective.
exec(compile("""
def exchange(peer):
    peer.sendall(b"x")
    return peer.recv(1)
""", "torch/distributed/stand_in.py", "exec"))

def loop():  # in one line, as a stack may be taken in any
    while True: pass

def hang(step):
    """Hang as asked for, in the first start only; or be slow."""
    if value("--hangs-at", "") != f"{rank}:{step}" or os.path.exists("restarted"):
        return
    open("restarted", "w").close()
    if value("--hangs-in", "loop") == "loop":
        loop()
    time.sleep(float(value("--hangs-in", "")))

heart = Heart()
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
heart.beat(STARTING)
tracker = save + "/latest_checkpointed_iteration.txt"
first = int(open(tracker).read()) if "--load" in sys.argv and os.path.exists(tracker) else 0
peer.settimeout(float(value("--distributed-timeout-minutes", "10")) * 60)
record("running", 0)
for step in range(first, steps):
    heart.beat(STEP, step + 1)
    hang(step + 1)
    try:
        received = exchange(peer)
    except TimeoutError:
        raise RuntimeError("Timed out waiting 1000ms for recv operation") from None
    except OSError as error:
        raise RuntimeError(f"Connection closed by peer: {error}") from None
    if not received:
        raise RuntimeError("Connection closed by peer")
    print(" iteration", step + 1, flush=True)
    heart.beat(BETWEEN, step + 1)
    if (step + 1) % 10 == 0:
        heart.beat(CHECKPOINT, step + 1)
        if rank:
            time.sleep(float(value("--slow-save", "0")))
            with open(tracker, "w") as file:
                file.write(str(step + 1))
        heart.beat(BETWEEN, step + 1)
    time.sleep(0.05)
if not os.path.exists("unfinished"):
    record("finished", steps)
helper.kill()
'''
ENDLESS = ["--train-iters", "1000000"]


def prepare(folder: Path, real: bool = False) -> None:
    """Write what a start finds in its working directory: the config, and the stand-in where Megatron does not train."""
    (folder / "tiny.yaml").write_text(TINY)
    if not real:
        # Ranks look in the working directory first, as DeepSpeed puts it.
        package = folder / "megatron_patch"
        package.mkdir(exist_ok=True)
        # With the rest of the real one behind it.
        (package / "__init__.py").write_text(f"__path__.append({str(LAUNCH.parent / 'megatron_patch')!r})\n")
        (package / "__main__.py").write_text(STAND_IN)


class Start:
    """The script, started on nodea.

    Args:
        hosts: the pair.
        folder: to start in, on the shared file system.
        arguments: of the script, after hostfile and config.
        real: Megatron trains, not the stand-in.
        script: of the user, in the place of launch/pretrain_gpt.py.
        node: without ssh, on this one of the hosts; the other one needs a start of its own.
    """

    def __init__(
        self,
        hosts: TwoHosts,
        folder: Path,
        *arguments: str,
        real: bool = False,
        node: int | None = None,
        script: str | None = None,
        **more: str,
    ) -> None:
        self.hosts, self._folder = hosts, folder
        prepare(folder, real)
        number = len(list(folder.glob("out*")))
        self.out, self.err = folder / f"out{number}", folder / f"err{number}"
        words = ["--hostfile", str(hosts.hostfile), "--config", "tiny.yaml", *([script] if script else [])]
        words += ["--tensor-model-parallel-size", "2"]
        if node is not None:
            words += ["--no-ssh", "--node-rank", str(node), "--master-addr", hosts.a.address]
        self.host = hosts.both[node or 0]
        self.process = self.host.popen(
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
        """A process of the run: rank or launcher on `host`; runner, pdsh or script where it was started."""
        for pid, words, env in (host or self.host).processes():
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
        raise AssertionError(f"no {what}: {[words for _, words, _ in (host or self.host).processes()]}")

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
