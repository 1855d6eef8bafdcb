"""The command line: hands it to the command that it names, and imports nothing of the others."""

import difflib
import importlib
import os
import sys

from megatron_patch.errors import ExitCode
from megatron_patch.version import __version__

COMMANDS = {
    "run": "run an untouched Megatron script with our flags",
    "explain": "show which parameter would get which LR, weight decay and eps, and why; no GPU, no peers",
    "sweep": "train a grid of models, or what a sampler chooses",
    "transfer": "turn the sweep of a proxy into the tuned config of a wide model",
    "report": "turn runs or a sweep into one HTML page and a picture",
    "tokenizer": "train a sentencepiece tokenizer",
    "preprocess": "turn text into a Megatron dataset (.bin and .idx)",
    "doctor": "say of every host of a hostfile what would keep a run from starting",
    "selfcheck": "try everything on the machine at hand, a GPU's or not; one table, one page, one file",
}
"""Each is the module of the same name in this folder, with what --help says of it."""


def started_as() -> str:
    """Return how a user calls this program."""
    return "python -m megatron_patch" if os.path.basename(sys.argv[0]) == "__main__.py" else "megatron-patch"


def usage() -> str:
    """Return what --help prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [f"usage: {started_as()} COMMAND ...", "", *lines, "", f"Each has a --help. Version: {started_as()} --version"]
    )


def main() -> None:
    """Hand the command line to the command it names, and exit with its code."""
    first, *rest = sys.argv[1:] or ["--help"]
    if first in ("-h", "--help"):
        print(usage())
    elif first == "--version":
        print(f"megatron-patch {__version__}")
    elif first in ("run", "explain"):
        getattr(importlib.import_module(f"megatron_patch.entry.{first}"), first)(rest)
    elif first in COMMANDS:
        sys.exit(importlib.import_module(f"megatron_patch.entry.{first}").main(rest, f"{started_as()} {first}"))
    else:
        near = difflib.get_close_matches(first, COMMANDS, n=1, cutoff=0.0)[0]
        expected = ", ".join(COMMANDS)
        print(f"error: COMMAND {first}: expected one of {expected}; did you mean {near}?", file=sys.stderr)
        sys.exit(ExitCode.MISTAKE)
