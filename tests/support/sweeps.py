"""A sweep in a folder of its own, by a training that takes a moment, and the tool run on it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

HANGS = 1800.0  # seconds after which something hangs, however busy the machine
FAKE = str(Path(__file__).parents[1] / "support" / "fake_training.py")
TOOL = str(Path(__file__).parents[2] / "tools" / "sweep.py")
COMMAND = ["{python}", FAKE, "{config}"]
BASE = {"hidden-size": 32, "lr": 0.01, "weight-decay": 0.1, "seed": 1}
LRS = [2.0**e for e in range(-8, -2)]


class Folder:
    """A folder with a sweep file, and the tool run on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.queue: dict[str, Any] = {}
        self.out = path / "out"
        self.write()

    def write(self, base: dict[str, Any] | None = None, **content: Any) -> None:
        """Write the sweep: six LRs by the fake training, and what is given on top; None drops an entry."""
        (self.path / "base.yaml").write_text(yaml.safe_dump({**BASE, **(base or {})}))
        entries = {
            "config": "base.yaml",
            "output": str(self.out),
            "command": COMMAND,
            "grid": {"lr": {"log2": [-8, -3]}},
        }
        entries |= {key.replace("_", "-"): value for key, value in content.items()}
        entries = {key: value for key, value in entries.items() if value is not None}
        (self.path / "sweep.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start the tool in a process of its own."""
        unchecked = () if "--dry-run" in arguments else ("--no-check",)  # Megatron knows no flag of the fake training
        words = [sys.executable, TOOL, str(self.path / "sweep.yaml"), *arguments, *unchecked]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Run it to its end: exit code, stdout, stderr."""
        return finish(self.start(*arguments))

    def starts(self) -> dict[str, int]:
        """How often each trial was started; what is replaced is forgotten."""
        files = sorted(self.out.glob("trials/*/transfer/starts"))
        return {file.parts[-3]: len(file.read_text().splitlines()) for file in files}

    def pids(self) -> list[int]:
        """The processes of the trainings that were started."""
        return [int(line.split()[0]) for file in self.out.glob("trials/*/transfer/starts") for line in file.open()]

    def statuses(self) -> dict[str, str]:
        """What each run.json says."""
        files = sorted(self.out.glob("trials/*/transfer/run.json"))
        return {file.parts[-3]: json.loads(file.read_text())["status"] for file in files}


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=HANGS)
    return process.returncode, out, err


def wait_for(condition: Callable[[], bool], seconds: float = HANGS) -> None:
    """Wait until something is true; the limit only ends what hangs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
