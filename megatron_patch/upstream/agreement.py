"""Before the first step: all ranks train the same thing.

Other code, other data or another library on one host trains on without a word, and a `--save` that is not one place
leaves half a checkpoint on each. So every rank says what it is about to run, in hashes; a difference stops them all.
"""

import enum
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.hosts.same import DATA, FILES, code, data, differences, digest, versions, who
from megatron_patch.upstream.ranks import gather

OF_A_RANK = frozenset({"rank", "local_rank"})
"""Megatron's arguments that are each rank's own."""
OF_A_HOST = frozenset({"data_cache_path", "tensorboard_dir", "wandb_save_dir", "metrics_dir"})
"""Megatron's arguments that may name another place on each host, for what a host writes; so may `DATA` and `FILES`, of
which the content is compared."""
SEEN_SECONDS = 30.0
"""Within which every host must see a file that rank 0 has written: a network file system's caches are that slow."""
ALLOW = "--allow-rank-differences"


def check_agreement(args: Any, allow: bool, say: Callable[[str], None]) -> None:
    """Compare what the ranks are about to train; a collective call.

    Args:
        args: Megatron's.
        allow: only warn of differences.
        say: prints a line, once for all ranks.

    Raises:
        ConfigError: on all ranks, if two ranks differ: what, the values, their ranks and hosts; or if ``--save`` cannot
            be written to.
    """
    host = socket.gethostname()
    told = gather((host, facts(args)))
    if len(told) < 2:
        return
    hosts = [host for host, _ in told]
    arguments = plain_arguments(args)
    if len({values["arguments"] for _, values in told}) > 1:
        told = [(h, {**values, **own}) for (h, values), own in zip(told, gather(arguments), strict=True)]
    found = differences(hosts, [values for _, values in told])
    found += _one_place(args, hosts)
    if not found:
        return
    if allow:
        for item, got in found:
            say(f"WARNING: the ranks differ in {item}: {got}")
        return
    differ = "; ".join(f"{item} ({got})" for item, got in found)
    raise ConfigError("the ranks", f"differ in {differ}", "none", f"repair what differs, or add {ALLOW}")


def facts(args: Any) -> dict[str, str]:
    """Return what this rank is about to train, each as a short text that another rank's can be compared with.

    Files are read by one rank of each host; the entries are missing on its others.
    """
    found = versions()
    found["arguments"] = digest(f"{name}={value}" for name, value in sorted(plain_arguments(args).items()))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        found |= code()
        found |= data(vars(args))
    return found


def plain_arguments(args: Any) -> dict[str, str]:
    """Return Megatron's arguments as the flags and texts that must agree: numbers, words, switches, lists of them."""
    skipped = OF_A_RANK | OF_A_HOST | set(DATA) | set(FILES)
    return {
        f"--{name.replace('_', '-')}": str(value)
        for name, value in vars(args).items()
        if name not in skipped and not name.startswith("_") and _plain(value)
    }


def _plain(value: Any) -> bool:
    """Whether a value's text is the same in every process."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, enum.Enum))


def _one_place(args: Any, hosts: Sequence[str]) -> list[tuple[str, str]]:
    """Look on every rank for a file that rank 0 writes in `--save`; a collective call."""
    folder = getattr(args, "save", None)
    if len(set(hosts)) < 2 or not folder or "://" in folder:
        return []
    name = gather(f".one-place-{uuid.uuid4().hex}")[0]
    path = os.path.join(folder, name)
    failed = gather(_written(path) if args.rank == 0 else "")[0]
    if failed:
        fix = "make room, correct its permissions, or give another folder"
        raise ConfigError("--save", folder, f"a folder that can be written to ({failed})", fix)
    seen = gather(_appears(path))
    if args.rank == 0:
        Path(path).unlink()
    blind = [rank for rank, one in enumerate(seen) if not one]
    if not blind:
        return []
    return [("--save", f"{folder}, where {who(blind, hosts)} cannot see what rank 0 ({hosts[0]}) writes")]


def _written(path: str) -> str:
    """Make an empty file and return why it cannot be made; empty if it was."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(path).touch()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _appears(path: str) -> bool:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return True  # this host's first rank looks
    until = time.monotonic() + SEEN_SECONDS
    while not os.path.exists(path):
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True
