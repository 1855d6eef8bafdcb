"""What a rank would train with: versions, variables, source files, data; short texts to compare with other hosts'.

Standard library alone, as everything that an agent is made of (`megatron_patch.hosts.agent`).
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PACKAGES = ("megatron-core", "torch", "transformer-engine", "numpy", "deepspeed", "apex", "flash-attn")
"""Whose versions must agree, beside Python's."""
SOURCES = ("megatron_patch", "megatron.core", "megatron.training")
"""Whose files must agree."""
SWITCHES = ("NVTE_", "NVIDIA_TF32_OVERRIDE", "MAMBA_", "TRITON_F32")
"""Beginnings of environment variables that change what is computed. Not MEGATRON_: a launch on every host has its own
MEGATRON_PATCH_JOB."""
VARIABLE = "the variable "
DATA = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
"""Megatron's arguments that name datasets, each with or without its weight."""
FILES = ("tokenizer_model", "vocab_file", "merge_file", "data_args_path", "per_split_data_args_path")
"""Those that name a file, or something else."""
SAMPLE_BYTES = 65_536
SAMPLES = 16
"""A large file's hash is of its size, and of so many pieces of that size, the first and the last among them."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of `PACKAGES`, and the variables that begin with one of `SWITCHES`."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {f"{VARIABLE}{name}": value for name, value in os.environ.items() if name.startswith(SWITCHES)}


def code() -> dict[str, str]:
    """Hashes of the source files of `SOURCES`, of the script, and of the modules beside it that are in use."""
    found = {}
    for name in SOURCES:
        spec = importlib.util.find_spec(name)
        places = list(spec.submodule_search_locations or ()) if spec else []
        found[f"the source of {name}"] = digest(
            text for place in places for path in sorted(Path(place).rglob("*.py")) for text in _named(path, place)
        )
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None or not os.path.isfile(script):
        return found
    folder = os.path.dirname(os.path.abspath(script))
    found[f"the script {os.path.basename(script)}"] = digest([Path(script).read_bytes()])
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or script  # the script is __mp_main__ too
        own = path != script and os.path.abspath(path).startswith(f"{folder}{os.sep}") and "site-packages" not in path
        if own and name.partition(".")[0] not in ("megatron", "megatron_patch") and os.path.isfile(path):
            found[f"the module {name}"] = digest([Path(path).read_bytes()])
    commit = _commit(folder)
    return found | ({"the commit of the script's repository": commit} if commit else {})


def _named(path: Path, folder: str) -> Iterable[bytes]:
    return str(path.relative_to(folder)).encode(), path.read_bytes()


def _commit(folder: str) -> str:
    """Return the commit checked out in `folder`; empty where there is none, or no git."""
    command = ["git", "-C", folder, "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def sampled(path: str) -> str:
    """Return a file's size and a hash of `SAMPLES` pieces spread over it; of a small file, of all of it."""
    found = hashlib.sha256()
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            if size <= SAMPLES * SAMPLE_BYTES:
                found.update(file.read())
            else:
                for place in range(SAMPLES):
                    file.seek((size - SAMPLE_BYTES) * place // (SAMPLES - 1))
                    found.update(file.read(SAMPLE_BYTES))
    except OSError as error:  # whoever opens it to train will say so too; here it must not leave the others waiting
        return f"unreadable ({error.strerror})"
    return f"{size:,} bytes, sha256 {found.hexdigest()[:12]}"


def data(arguments: Mapping[str, Any], folder: str = "") -> dict[str, str]:
    """Return size and hash of samples of every dataset and file that Megatron's arguments name.

    Args:
        arguments: by attribute name.
        folder: that paths are relative to; else the working directory.
    """
    paths: dict[str, str] = {}
    for name in DATA:
        for word in arguments.get(name) or ():
            if "://" in word or _is_number(word):  # an object store, or the weight of the next dataset
                continue
            for ending in (".idx", ".bin"):
                what = f"the file {os.path.basename(word)}{ending}"
                namesakes = sum(other.startswith(what) for other in paths)
                what += f" ({namesakes + 1})" if namesakes else ""
                paths[f"{what} of --{name.replace('_', '-')}"] = os.path.join(folder, f"{word}{ending}")
    for name in FILES:
        path = arguments.get(name)
        if isinstance(path, str) and os.path.isfile(os.path.join(folder, path)):
            paths[f"the file of --{name.replace('_', '-')}"] = os.path.join(folder, path)
    # A network file system answers many at a time.
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(paths, pool.map(sampled, paths.values()), strict=True))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def digest(parts: Iterable[str | bytes]) -> str:
    """Return the hash of a sequence, as a short text."""
    found = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        found.update(len(content).to_bytes(8, "big") + content)  # so that no two sequences run into one
    return f"sha256 {found.hexdigest()[:12]}"


def differences(hosts: Sequence[str], facts: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Return what the ranks do not agree in: its name, and its values with the ranks and hosts that have each.

    An entry that a rank lacks is not compared; but a variable that it lacks is not set there. The digest of all
    arguments is left out where the arguments themselves are there.

    >>> differences(["a", "a", "b"], [{"torch": "2.14", "code": "1"}, {"torch": "2.14"}, {"torch": "2.15"}])
    [('torch', '2.14 on ranks 0, 1 (a), 2.15 on rank 2 (b)')]
    """
    found = []
    for item in dict.fromkeys(item for values in facts for item in values):
        if item == "arguments" and any(name.startswith("--") for values in facts for name in values):
            continue
        having: dict[str, list[int]] = {}
        for rank, values in enumerate(facts):
            value = values.get(item, "not set" if item.startswith((VARIABLE, "--")) else None)
            if value is not None:
                having.setdefault(value, []).append(rank)
        if len(having) > 1:
            found.append((item, ", ".join(f"{value} on {who(ranks, hosts)}" for value, ranks in having.items())))
    return found


def who(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return where ranks are: ``ranks 0, 1, 2, 3 and 12 more (node1, node2)``."""
    shown = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown} ({', '.join(names[:3])}{more})"
