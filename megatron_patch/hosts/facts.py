"""What hosts are compared by before a start.

Standard library alone, as everything that an agent is made of (`megatron_patch.hosts.agent`).
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import time
from typing import Any

from megatron_patch.hosts.processes import processes
from megatron_patch.hosts.same import data

NVIDIA_SMI = ("/usr/bin", "/usr/local/nvidia/bin", "/opt/bin")
"""Where it lies, if not on PATH: a command over ssh has a short one."""
GPU_PATIENCE = 30.0
"""Seconds for nvidia-smi, which takes a few where no process keeps the driver up."""


def existing(path: str) -> str:
    """Return the nearest folder above that exists, or `path` itself."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def port_trouble(port: int) -> str | None:
    """Return why nobody could listen on a port of this host; None if it is free."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("", port))
        except OSError as error:
            return error.strerror or str(error)
    return None


def _versions(names: list[str]) -> dict[str, str]:
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def gpus() -> dict[str, Any]:
    """Return what nvidia-smi says: ``driver``, and ``gpus``, a list of name, MiB in all, MiB in use; or ``trouble``."""
    tool = shutil.which("nvidia-smi", path=os.pathsep.join((os.environ.get("PATH", ""), *NVIDIA_SMI)))
    if tool is None:
        return {"trouble": "there is no nvidia-smi"}
    query = "--query-gpu=driver_version,name,memory.total,memory.used"
    command = [tool, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GPU_PATIENCE, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {"trouble": f"nvidia-smi does not answer within {GPU_PATIENCE:.0f} s: has a GPU failed?"}
    except OSError as error:
        return {"trouble": f"nvidia-smi cannot be started ({error.strerror or error})"}
    rows = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or any(len(row) != 4 for row in rows):
        said = (done.stdout + done.stderr).strip().splitlines()
        return {"trouble": f"nvidia-smi fails with exit code {done.returncode}: {said[-1] if said else 'no word'}"}
    listed = [[name, _mebibytes(total), _mebibytes(used)] for _, name, total, used in rows]
    return {"driver": rows[0][0] if rows else "", "gpus": listed}


def _mebibytes(text: str) -> int | None:
    """Return a number of nvidia-smi; None where it says "[N/A]"."""
    return int(text) if text.isdigit() else None


def facts(
    folder: str,
    files: list[str],
    packages: list[str],
    save: str | None,
    port: int | None,
    arguments: dict[str, Any] | None = None,
    gpu: bool = False,
) -> dict[str, Any]:
    """Return what hosts are compared by.

    Args:
        folder: the working directory of the run.
        files: paths, relative to it or absolute, that must be equal everywhere.
        packages: whose versions must be.
        save: --save, if the run has it.
        port: the master port, on the first host.
        arguments: those of Megatron's that name data, by attribute name.
        gpu: whether to look for GPUs.
    """
    said: dict[str, Any] = {"host": socket.gethostname(), "time": time.time(), "python": platform.python_version()}
    said["folder"] = os.path.isdir(folder)
    said["versions"] = _versions(packages)
    said["files"] = {}
    for name in files:
        try:
            with open(os.path.join(folder, name), "rb") as file:
                said["files"][name] = hashlib.sha256(file.read()).hexdigest()
        except OSError as error:
            said["files"][name] = error.strerror or str(error)
    if save is not None:
        there = existing(os.path.join(folder, save))
        room = os.statvfs(there)
        said["free"], said["writable"] = room.f_bavail * room.f_frsize, os.access(there, os.W_OK)
    said["port"] = None if port is None else port_trouble(port)
    said["data"] = data(arguments or {}, folder)
    said["gpus"] = gpus() if gpu else None
    said["jobs"] = sorted({p.job for p in processes()})
    return said
