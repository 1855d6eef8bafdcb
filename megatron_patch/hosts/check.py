"""What is asked of all hosts before a job may start, all at once and in seconds."""

import contextlib
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.hosts.job import CLOCKS
from megatron_patch.hosts.remote import Hosts, Lost
from megatron_patch.hosts.same import PACKAGES
from megatron_patch.hosts.save_lock import LOCK

HELLO = 90.0
"""Seconds for ssh and Python to start on the slowest host; one that cannot be reached is told after 10."""
SEEN = 10.0
"""Seconds after which a file that one host wrote is seen by the others, where it is the same file system."""


IN_USE = 1024
"""MiB of a GPU above which it is not free: an idle one has a few hundred."""


@dataclass(frozen=True)
class Wanted:
    """What a job wants of its hosts."""

    folder: str
    """The working directory."""
    files: tuple[str, ...] = ()
    """That must be equal everywhere, such as the config."""
    save: str | None = None
    """--save, absolute."""
    port: int = 29500
    """The master port, on the first host."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Megatron's arguments that name data, by attribute name."""
    slots: Mapping[str, int] | None = None
    """GPUs that each host must have; None: GPUs are not looked at."""


@dataclass(frozen=True)
class Trouble:
    """One thing that is not as it should be."""

    host: str
    text: str
    fatal: bool = True
    """The run would fail, or be wrong."""

    def __str__(self) -> str:
        return f"{self.host}: {'' if self.fatal else 'warning: '}{self.text}"


def read_hostfile(path: str) -> dict[str, int]:
    """Return the hosts of a hostfile in its order, with the slots of each; 1 where none are given.

    Raises:
        ConfigError: it cannot be read, or has no host.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.partition("#")[0].split() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--hostfile", path, "a readable file", f"check the path ({error})") from None
    names = {words[0]: _slots(words[1:]) for words in lines if words}
    if not names:
        raise ConfigError("--hostfile", path, 'one line "HOST slots=GPUS" per machine', "write them")
    return names


def _slots(words: Sequence[str]) -> int:
    given = (word.removeprefix("slots=") for word in words if word.startswith("slots="))
    return next((int(number) for number in given if number.isdigit()), 1)


def greet(hosts: Hosts) -> None:
    """Wait until every host's agent answers.

    Raises:
        ConfigError: some do not; all of them are named.
    """
    silent = {name: answer for name, answer in hosts.ask("ping", within=HELLO).items() if isinstance(answer, Exception)}
    if silent:
        name, why = next(iter(silent.items()))
        others = f"; {', '.join(list(silent)[1:])} neither" if len(silent) > 1 else ""
        raise ConfigError(
            "--hostfile",
            name,
            "a host that answers over ssh without a password and has this Python",
            f"try `ssh {name} true` ({why}){others}",
        )


def examine(hosts: Hosts, wanted: Wanted) -> list[Trouble]:
    """Ask all hosts for their facts, and return what is wrong with them, by host."""
    began = time.time()
    common: dict[str, Any] = {
        "folder": wanted.folder,
        "files": list(wanted.files),
        "packages": [*PACKAGES, "megatron-patch"],
        "save": wanted.save,
    }
    rest: dict[str, Any] = {"arguments": dict(wanted.data), "gpu": wanted.slots is not None}
    first = hosts.first.ask("facts", port=wanted.port, **common)
    answers = hosts.ask("facts", port=None, **common, **rest)
    ended = time.time()
    troubles = []
    with contextlib.suppress(Lost, OSError):  # then its other answer is one, too
        if why := hosts.first.answer(first)["port"]:
            text = f"nobody can listen on port {wanted.port} ({why}): another job? give another --master-port"
            troubles.append(Trouble(hosts.first.host, text))
    model, reference = next(((h, a) for h, a in answers.items() if isinstance(a, dict)), ("", {}))
    for host, answer in answers.items():
        if isinstance(answer, dict):
            troubles += _of_host(host, answer, model, reference, wanted)
            if not began - CLOCKS <= answer["time"] <= ended + CLOCKS:
                text = f"its clock is {answer['time'] - ended:+.0f} s from that of the launching side"
                troubles.append(Trouble(host, text, fatal=False))
        else:
            troubles.append(Trouble(host, str(answer)))
    return troubles


def _of_host(
    host: str, facts: Mapping[str, Any], first: str, reference: Mapping[str, Any], wanted: Wanted
) -> list[Trouble]:
    found = []
    if not facts["folder"]:
        found.append(Trouble(host, f"no folder {wanted.folder}: code and data must be at the same paths everywhere"))
    for name in wanted.files:
        if facts["files"][name] != reference["files"][name]:
            found.append(Trouble(host, f"{name} is not that of {first} ({_short(facts['files'][name])})"))
    for name in sorted({*facts["versions"], *reference["versions"]}):
        ours, theirs = (entry["versions"].get(name, "missing") for entry in (facts, reference))
        if ours != theirs:
            found.append(Trouble(host, f"{name} {ours}, on {first} {theirs}"))
    if facts["python"] != reference["python"]:
        found.append(Trouble(host, f"Python {facts['python']}, on {first} {reference['python']}"))
    for what in sorted({*facts["data"], *reference["data"]}):
        ours, theirs = (entry["data"].get(what, "not there") for entry in (facts, reference))
        if ours != theirs:
            found.append(Trouble(host, f"{what} is not that of {first} ({ours}; there {theirs})"))
        elif ours.startswith("unreadable"):
            found.append(Trouble(host, f"{what} is {ours}", fatal=False))  # a script may read other formats
    if wanted.slots is not None:
        found += of_gpus(host, facts["gpus"], first, reference["gpus"], wanted.slots.get(host, 1))
    if wanted.save is not None:
        if not facts["writable"]:
            found.append(Trouble(host, f"--save {wanted.save} cannot be written to"))
        if facts["free"] < 2**30:
            found.append(Trouble(host, f"{facts['free'] / 2**20:.0f} MiB free at --save {wanted.save}", fatal=False))
    for job in facts["jobs"]:
        found.append(Trouble(host, f"processes of the job {job} are running", fatal=False))
    return found


def of_gpus(host: str, found: Mapping[str, Any], first: str, reference: Mapping[str, Any], slots: int) -> list[Trouble]:
    """Return what is wrong with a host's GPUs, of which `slots` are wanted; compared with those of the first host."""
    if why := found.get("trouble"):
        # Without the tool nothing is known: GPUs of another maker have another.
        return [Trouble(host, f"{why}, and slots={slots} GPUs are asked for", fatal=not why.startswith("there is no"))]
    troubles = []
    listed = found["gpus"]
    if len(listed) < slots:
        troubles.append(Trouble(host, f"slots={slots} in the hostfile, and nvidia-smi lists {len(listed)} GPUs"))
    for number, (name, total, used) in enumerate(listed[:slots]):
        if used is not None and used > IN_USE:
            text = f"GPU {number} ({name}) has {used:,} of {total or 0:,} MiB in use: by another job?"
            troubles.append(Trouble(host, text, fatal=False))
    theirs = reference.get("gpus") or []
    if theirs and listed and listed[0][:2] != theirs[0][:2]:
        kinds = [f"{entry[0][0]} with {entry[0][1]} MiB" for entry in (listed, theirs)]
        troubles.append(Trouble(host, f"its GPUs are {kinds[0]}, on {first} {kinds[1]}", fatal=False))
    if reference.get("driver", found["driver"]) != found["driver"]:
        text = f"NVIDIA driver {found['driver']}, on {first} {reference['driver']}"
        troubles.append(Trouble(host, text, fatal=False))
    return troubles


def _short(said: str) -> str:
    """Of a digest, or the reason why there is none."""
    return f"sha256 {said[:8]}" if len(said) == 64 and " " not in said else said


def take_save(hosts: Hosts, save: str, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Take the lock in --save, and return what a dead job left in it, if there was one.

    Raises:
        ConfigError: another job has it; --save cannot be written to, or is not one place for all hosts.
    """
    first, dead = hosts.first, None
    try:
        taken = first.answer(first.ask("lock", save=save, record=dict(record)))
        if taken["dead"] is not None:
            job = taken["other"].get("job", "")
            watched = hosts.ask("watched", job=job) if job else {}
            if not any(answer is True for answer in watched.values()):
                dead = dict(taken["other"])
                taken = first.answer(first.ask("lock", save=save, record=dict(record), over=taken["dead"]))
    except (Lost, OSError) as error:
        raise ConfigError("--save", save, f"a folder that {first.host} can write to", str(error)) from None
    if not taken["held"]:
        other = taken["other"]
        who = f"job {other.get('job')} of {other.get('host')} (PID {other.get('pid')}) since {other.get('started')}"
        raise ConfigError("--save", save, f"a folder that no other run writes to, and {who} does", "wait, or end it")
    see(hosts, save)
    return dead


def see(hosts: Hosts, save: str) -> None:
    """Let every host look for a file that the first one writes.

    Raises:
        ConfigError: one does not see it.
    """
    first = hosts.first
    token = secrets.token_hex(8)
    path = os.path.join(save, f"{LOCK}.seen-{token}")
    try:
        first.answer(first.ask("write", path=path, text=token))
        seen = hosts.ask("read", path=path, patience=SEEN)
        first.answer(first.ask("remove", path=path))
    except (Lost, OSError) as error:
        raise ConfigError("--save", save, f"a folder that {first.host} can write to", str(error)) from None
    blind = [name for name, answer in seen.items() if answer != token]
    if blind:
        raise ConfigError(
            "--save",
            save,
            "one place for all hosts",
            f"{', '.join(blind)} cannot see what {first.host} writes there; give a folder on a shared file system",
        )
