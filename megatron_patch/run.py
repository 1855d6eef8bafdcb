"""``python -m megatron_patch run``: install the hooks, then run an untouched Megatron script as ``__main__``."""

import argparse
import difflib
import os
import re
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from megatron_patch.errors import ConfigError, MegatronPatchError

if TYPE_CHECKING:
    from megatron_patch.upstream.hooks import Installation

USAGE = """usage: python -m megatron_patch run [--config FILE.yaml] [SCRIPT.py] [Megatron's arguments] [our flags]

SCRIPT.py is any Megatron training script, run untouched as if it had been started directly; without one, the project's
own launch/pretrain_gpt.py. FILE.yaml holds flags (`num-layers: 4`); the command line wins over it.
Example: deepspeed --num_gpus 2 --no_local_rank --module megatron_patch run --config configs/quickstart_proxy.yaml
See all flags with: python -m megatron_patch run SCRIPT.py --help
See what a run would do, on any machine, with: python -m megatron_patch explain --help"""

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
# The wheel carries the script inside the package; in a checkout, and its editable install, it lies beside it.
_INSIDE = os.path.join(_PACKAGE, "launch", "pretrain_gpt.py")
_BESIDE = os.path.join(os.path.dirname(_PACKAGE), "launch", "pretrain_gpt.py")
DEFAULT_SCRIPT = _INSIDE if os.path.isfile(_INSIDE) else _BESIDE


def split_command_line(argv: Sequence[str]) -> tuple[str | None, str, list[str]]:
    """Return (YAML file or None, script, the script's arguments) of what follows ``run``.

    Raises:
        ConfigError: --config without a file, or a script that does not exist.
    """
    rest = list(argv)
    config = None
    if rest and rest[0].partition("=")[0] == "--config":
        first = rest.pop(0)
        config = first.partition("=")[2] or (rest.pop(0) if rest and not rest[0].startswith("--") else "")
        if not config:
            raise ConfigError("--config", None, "a YAML file", "name the file after --config")
    script = rest.pop(0) if rest and not rest[0].startswith("-") else DEFAULT_SCRIPT
    if not os.path.isfile(script):
        raise ConfigError(
            "SCRIPT.py", script, "an existing Python file", "check the path (flags of Megatron begin with --)"
        )
    return config, script, rest


_FLAG_NAME = re.compile(r"[A-Za-z][^\s=]*")


def load_yaml(path: str) -> dict[str, Any]:
    """Return the flags in a YAML file, with dashes or underscores in the names and without a leading ``--``.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or is no flat mapping with each flag once.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        content = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError("--config", path, "a readable file", f"check the path ({error.strerror})") from None
    except Exception as error:  # not UTF-8, no YAML, or what PyYAML's constructors raise at 2001-02-30 and !!int ''
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise ConfigError(
            "--config", path, f"valid YAML{line}", f"correct it: {' '.join(str(error).split())}"
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError("--config", path, "a mapping of flag names to values", "write one `flag-name: value` a line")
    flags: dict[str, Any] = {}
    # The keys as they stand in the file: PyYAML keeps the last of equal ones without a word.
    root = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    written = [(str(key.value), key.start_mark.line + 1) for key, _ in root.value]
    lines: dict[str, int] = {}
    for key, line in written:
        name = _flag_name(key)
        if name in lines:
            raise ConfigError(
                f"{path}: {key}", f"at line {line}", f"each flag once, and line {lines[name]} has it", "delete one"
            )
        lines[name] = line
    for key, value in content.items():
        name = _flag_name(str(key))
        if not isinstance(key, str) or not _FLAG_NAME.fullmatch(name):
            raise ConfigError(f"{path}: {key}", value, "the name of a flag before the colon", "correct or quote it")
        if isinstance(value, (dict, set)) or (
            isinstance(value, list) and any(isinstance(v, (dict, set, list, tuple)) for v in value)
        ):
            raise ConfigError(
                f"{path}: {key}", value, "a value or a list of values", "write the flags flat, as on a command line"
            )
        flags[name] = value
    return flags


def _flag_name(text: str) -> str:
    """``--num_layers`` -> ``num-layers``."""
    return text.removeprefix("--").replace("_", "-")


def _known_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the options of a parser by `_flag_name`."""
    # argparse has no public way to ask.
    return {_flag_name(option): option for option in parser._option_string_actions if option.startswith("--")}


def yaml_arguments(flags: Mapping[str, Any], parser: argparse.ArgumentParser, command_line: Sequence[str]) -> list[str]:
    """Return the flags of a YAML file as a command line, leaving out those that `command_line` gives itself.

    ``true`` is a bare flag; ``false`` and null leave it out, or give ``--no-flag`` where the parser has such a pair.
    Keys that the parser does not know are passed on: the script may add arguments of its own. Where it does not,
    `explain_unknown` names the key.

    Raises:
        ConfigError: true or false for a flag that takes a value, a value for one that takes none, or several for one.
    """
    given = {_flag_name(word.partition("=")[0]) for word in command_line if word.startswith("--")}
    known = _known_flags(parser)
    arguments: list[str] = []
    for name, value in flags.items():
        option = known.get(name, f"--{name}")
        action = parser._option_string_actions.get(option)
        alternatives = {_flag_name(o) for o in action.option_strings} if action else {name}
        if value is None or alternatives & given:
            continue
        if action and (action.nargs == 0) != isinstance(value, bool):
            expected = "true or false, since it takes no value" if action.nargs == 0 else "a value, since it takes one"
            raise ConfigError(option, value, expected, "correct the YAML file (null leaves a flag out)")
        if isinstance(value, bool):
            if value:
                arguments.append(option)
            elif isinstance(action, argparse.BooleanOptionalAction) and not name.startswith("no-"):
                arguments.append(next(o for o in action.option_strings if o.startswith("--no-")))
        elif isinstance(value, list):
            if action and action.nargs is None:
                raise ConfigError(option, value, "one value", "correct the YAML file")
            arguments += [option, *map(str, value)]
        elif str(value).startswith("-"):
            arguments.append(f"{option}={value}")  # in a word of its own it would be taken for a flag
        else:
            arguments += [option, str(value)]
    return arguments


def explain_unknown(path: str, flags: Mapping[str, Any], parser: argparse.ArgumentParser) -> None:
    """Make `parser` refuse keys of the YAML file that neither Megatron nor the script knows, naming the nearest.

    That is known when the arguments are parsed and no sooner, for the script adds its own to Megatron's parser.
    """
    original = parser.parse_args

    def parse_args(args: Any = None, namespace: Any = None) -> Any:
        known = _known_flags(parser)
        for name, value in flags.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                raise ConfigError(
                    f"{path}: {name}", value, "a flag of Megatron or of megatron_patch", f"did you mean {near[0]}?"
                )
        words = list(sys.argv[1:] if args is None else args)
        spelled = {f"--{name}": known[name] for name in flags}  # a script's own flags may have underscores
        return original([spelled.get(word, word) for word in words], namespace)

    parser.parse_args = parse_args  # type: ignore[method-assign]


def asked_for(name: str, flags: Mapping[str, Any], command_line: Sequence[str]) -> bool:
    """Return whether a bare flag is on the command line or true in the YAML file."""
    return f"--{name}" in command_line or flags.get(name) is True


def megatron_arguments(
    path: str | None,
    flags: Mapping[str, Any],
    arguments: list[str],
    installed: list["Installation"],
    prepare_parser: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> list[str]:
    """Put our flags into Megatron's parser and return the whole command line for it.

    The CPU platform must be up before, if it is wanted: Megatron is imported here.

    Args:
        path: the YAML file `flags` is from.
        flags: of `load_yaml`.
        arguments: the command line, without the script; it wins over `flags`.
        installed: collects the hooks, now and when Megatron validates.
        prepare_parser: called with every parser that Megatron makes, before its arguments are added.
    """
    from megatron_patch.upstream.flags import add_arguments
    from megatron_patch.upstream.hooks import check_version, install
    from megatron_patch.upstream.patch import entry_hooks, megatron_parser

    check_version(asked_for("allow-untested-megatron", flags, arguments))

    def prepare(parser: argparse.ArgumentParser) -> None:
        explain_unknown(path or "", flags, parser)
        prepare_parser(parser)

    installed.append(install(entry_hooks(installed, prepare)))
    arguments = yaml_arguments(flags, megatron_parser(), arguments) + arguments
    given = {word.partition("=")[0] for word in arguments}
    ours = sorted(given & set(add_arguments(argparse.ArgumentParser(add_help=False))._option_string_actions))
    if "--yaml-cfg" in given and ours:
        raise ConfigError(
            "--yaml-cfg",
            f"with {ours[0]}",
            "no flag beside it: Megatron then takes its settings from that file and forgets the command line",
            "give the flags on the command line, or in a file after `run --config`",
        )
    if "--cpu" in arguments:
        from megatron_patch.upstream.cpu_platform import cpu_arguments

        arguments, said = cpu_arguments(arguments)
        if int(os.environ.get("RANK", "0")) == 0:
            print(*said, sep="\n", flush=True)
    return arguments


def run(argv: Sequence[str]) -> None:
    """Run what ``python -m megatron_patch run`` was given; exits the process with code 2 on a user's mistake."""
    try:
        _run(argv)
    except MegatronPatchError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _run(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    path, script, arguments = split_command_line(argv)
    flags = load_yaml(path) if path else {}
    if asked_for("cpu", flags, arguments):
        from megatron_patch.upstream.cpu_platform import activate

        activate()
    # Only now: the CPU platform must be up before Megatron is imported.
    arguments = megatron_arguments(path, flags, arguments, installed=[])
    # As if the script had been run directly: its own argv, its folder first on the path, __main__ with a full path.
    script = os.path.abspath(script)
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")
