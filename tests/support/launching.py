"""A folder to run a launch script in, with stand-ins for deepspeed, pdsh, srun and scontrol that record it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAUNCH = Path(__file__).parents[2] / "launch"

RECORDER = """\
import json, os, sys
env_file = os.environ.get("DS_ENV_FILE", "")
call = {
    "argv": sys.argv[1:],
    "env": dict(os.environ),
    "env_file": open(env_file).read() if os.path.exists(env_file) else None,
}
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(call) + "\\n")
exec(os.environ.get("THEN", ""))
"""
# Runs its command once per node, at the same time, as srun does, without the options before it.
SRUN = """\
import json, os, subprocess, sys
command = sys.argv[1:]
with open(os.environ["CALLS"] + ".srun", "w") as calls:
    calls.write(json.dumps(command))
nodes = int(next(word for word in command if word.startswith("--nodes=")).partition("=")[2])
while command[0].startswith("--"):
    command.pop(0)
tasks = [subprocess.Popen(command, env=os.environ | {"SLURM_NODEID": str(node)}) for node in range(nodes)]
sys.exit(max([task.wait() for task in tasks]))
"""
SCONTROL = """\
import sys
assert sys.argv[1:] == ["show", "hostnames", "gpu[07-08]"], sys.argv
print("gpu07\\ngpu08")
"""


# Every host is this machine, as the agents of megatron_patch.hosts see it.
SSH = """\
import os, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    del words[: 2 if words[0] in ("-o", "-p") else 1]
os.execv("/bin/sh", ["sh", "-c", " ".join(words[1:])])
"""


@dataclass
class Result:
    """What a script did: its exit code and output, and every call of deepspeed in order."""

    code: int
    out: str
    err: str
    calls: list[dict[str, Any]]

    @property
    def argv(self) -> list[str]:
        """The arguments of the only call."""
        assert self.code == 0, self.err
        assert len(self.calls) == 1
        return list(self.calls[0]["argv"])


class Bench:
    """A working directory with `config.yaml`, `hosts`, and a PATH that starts with the stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        (folder / "home").mkdir()
        (folder / "config.yaml").write_text("num-layers: 2\n")
        (folder / ODD[0]).touch()
        (folder / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
        self.command("deepspeed", RECORDER)
        self.command("pdsh", RECORDER)
        self.command("ssh", SSH)
        self.command("srun", SRUN)
        self.command("scontrol", SCONTROL)

    def command(self, name: str, code: str) -> None:
        """Put a Python program on PATH."""
        path = self.bin / name
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        """A small environment of our own, so that the machine's does not matter."""
        return {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.folder / "home"),
            "CALLS": str(self.folder / "calls"),
            **more,
        }

    def run(self, script: str, *arguments: str, **env: str) -> Result:
        """Run a script of launch/ in the folder."""
        done = subprocess.run(
            [str(LAUNCH / script), *arguments],
            cwd=self.folder,
            env=self.environment(**env),
            capture_output=True,
            text=True,
            timeout=1800,
        )
        calls = self.folder / "calls"
        recorded = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        return Result(done.returncode, done.stdout, done.stderr, recorded)


ALONE = ["--hostfile", "/dev/null/no-hostfile"]
"""What tells DeepSpeed that there is this machine alone."""
RUN = ["--no_local_rank", "--module", "megatron_patch", "run", "--config", "config.yaml"]
ODD = ["my script.py", "--data-path", "0.3 a b", '{"q": 1}', "$HOME", "a'b", "x;y", "*", "", "--lr=1e-3"]


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_the_end(pid: int) -> None:
    """A process that was sent SIGKILL ends when the kernel gets to it, not at once."""
    deadline = time.monotonic() + 1800
    while running(pid):
        assert time.monotonic() < deadline, f"process {pid} lives"
        time.sleep(0.1)
