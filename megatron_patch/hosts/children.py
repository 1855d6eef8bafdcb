"""The processes that the launching side has started on its own machine."""

import contextlib
import ctypes
import os
import signal


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies: pdsh's ssh are then still found."""
    ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER, Linux 3.4


def end_children(keep: set[int]) -> None:
    """End the launcher's processes on this machine, and not those in `keep`, the agents' connections."""
    for pid in _descendants(os.getpid(), keep):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _descendants(pid: int, without: set[int]) -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                children.setdefault(int(file.read().rpartition(")")[2].split()[1]), []).append(int(name))
    found, todo = [], [child for child in children.get(pid, []) if child not in without]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found
