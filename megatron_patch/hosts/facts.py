"""What hosts are compared by before a start.

Standard library alone, as everything that an agent is made of (`megatron_patch.hosts.agent`).
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import socket
import time
from typing import Any

from megatron_patch.hosts.processes import processes


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


def facts(folder: str, files: list[str], packages: list[str], save: str | None, port: int | None) -> dict[str, Any]:
    """Return what hosts are compared by.

    Args:
        folder: the working directory of the run.
        files: paths, relative to it or absolute, that must be equal everywhere.
        packages: whose versions must be.
        save: --save, if the run has it.
        port: the master port, on the first host.
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
    said["jobs"] = sorted({p.job for p in processes()})
    return said
