"""``python -m megatron_patch run``: install the hooks, then run an untouched Megatron script as ``__main__``."""

import argparse
import builtins
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from megatron_patch.config import Settings
from megatron_patch.config.arguments import add_arguments
from megatron_patch.entry.exits import exit_code
from megatron_patch.entry.main import started_as
from megatron_patch.errors import ConfigError
from megatron_patch.files.yaml_flags import flag_name, load_yaml
from megatron_patch.hosts.heartbeat import Heart

if TYPE_CHECKING:
    from megatron_patch.upstream.patch import Session

USAGE = """usage: {started} run [--config FILE.yaml] [SCRIPT.py] [Megatron's arguments] [our flags]

SCRIPT.py is any Megatron training script, run untouched as if it had been started directly; without one, the project's
own launch/pretrain.py. FILE.yaml holds flags (`num-layers: 4`); the command line wins over it.
See Megatron's flags, 4,000 lines, with: {started} run SCRIPT.py --help
See what a run would do, on any machine, with: {started} explain --help

Examples:
  {started} run --config configs/quickstart_proxy.yaml --train-iters 40 --metrics-dir runs/try
  {started} run pretrain_gpt.py ... --width-scaling sqrt --base-hidden-size 256 --alignment-interval 100 --save runs/a
  deepspeed --num_gpus 8 --no_local_rank --module megatron_patch run --config configs/target_7b_h100_bf16.yaml

Our flags, beside Megatron's own:"""

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# The wheel carries the script inside the package; in a checkout, and its editable install, it lies beside it.
_INSIDE = os.path.join(_PACKAGE, "launch", "pretrain.py")
_BESIDE = os.path.join(os.path.dirname(_PACKAGE), "launch", "pretrain.py")
DEFAULT_SCRIPT = _INSIDE if os.path.isfile(_INSIDE) else _BESIDE


def usage() -> str:
    """Return what --help prints: how to call it, and our flags."""
    parser = argparse.ArgumentParser(
        add_help=False, formatter_class=lambda prog: argparse.HelpFormatter(prog, width=120)
    )
    described = add_arguments(parser).format_help()
    return USAGE.format(started=started_as()) + described.partition("width transfer:")[2].rstrip()


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
    separated = rest[:1] == ["--"]
    if separated:
        rest.pop(0)
    script = rest.pop(0) if rest and (separated or not rest[0].startswith("-")) else DEFAULT_SCRIPT
    if not os.path.isfile(script):
        raise ConfigError(
            "SCRIPT.py", script, "an existing Python file", "check the path (flags of Megatron begin with --)"
        )
    return config, script, rest


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return the question whether the nearest of `known` was meant; None where nothing is near.

    >>> did_you_mean("--bf61", ["--bf16", "--fp16"]), did_you_mean("--enable-gpt-oss", ["--enable-msc"])
    ('did you mean --bf16?', None)
    """
    by_word = {name.lstrip("-"): name for name in known}  # the dashes are no likeness
    near = difflib.get_close_matches(word.lstrip("-"), by_word, n=1, cutoff=0.75)
    return f"did you mean {by_word[near[0]]}?" if near else None


def _known_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the options of a parser by `flag_name`."""
    # argparse has no public way to ask.
    return {flag_name(option): option for option in parser._option_string_actions if option.startswith("--")}


def yaml_arguments(flags: Mapping[str, Any], parser: argparse.ArgumentParser, command_line: Sequence[str]) -> list[str]:
    """Return the flags of a YAML file as a command line, leaving out those that `command_line` gives itself.

    ``true`` is a bare flag; ``false`` and null leave it out, or give ``--no-flag`` where the parser has such a pair.
    Keys that the parser does not know are passed on: the script may add arguments of its own. Where it does not,
    `explain_unknown` names the key.

    Raises:
        ConfigError: true or false for a flag that takes a value, a value for one that takes none, or several for one.
    """
    given = {flag_name(word.partition("=")[0]) for word in command_line if word.startswith("--")}
    known = _known_flags(parser)
    arguments: list[str] = []
    for name, value in flags.items():
        option = known.get(name, f"--{name}")
        action = parser._option_string_actions.get(option)
        alternatives = {flag_name(o) for o in action.option_strings} if action else {name}
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
                fix = did_you_mean(name, known) or "correct the key, or remove it"
                raise ConfigError(f"{path}: {name}", value, "a flag of Megatron or of megatron_patch", fix)
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
    session: "Session",
    prepare_parser: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> list[str]:
    """Put our flags into Megatron's parser and return the whole command line for it.

    The CPU platform must be up before, if it is wanted: Megatron is imported here.

    Args:
        path: the YAML file `flags` is from.
        flags: of `load_yaml`.
        arguments: the command line, without the script; it wins over `flags`.
        session: installs the hooks, now and when Megatron validates; nothing is in it yet.
        prepare_parser: called with every parser that Megatron makes, before its arguments are added.
    """
    from megatron_patch.upstream.flags import refuse_yaml_cfg
    from megatron_patch.upstream.hooks import check_version, refuse_other_megatron
    from megatron_patch.upstream.patch import megatron_parser

    check_version(asked_for("allow-untested-megatron", flags, arguments))

    def prepare(parser: argparse.ArgumentParser) -> None:
        refuse_other_megatron()
        explain_unknown(path or "", flags, parser)
        prepare_parser(parser)

    session.begin(prepare)
    arguments = yaml_arguments(flags, megatron_parser(), arguments) + arguments
    refuse_yaml_cfg(arguments)
    first_rank = int(os.environ.get("RANK", "0")) == 0
    if first_rank and any(word.partition("=")[0] == "--yaml-cfg" for word in arguments):
        print(
            "warning: --yaml-cfg is broken in Megatron itself (0.19: it stops at settings that its reader does not "
            "fill in, such as disable_msc_deprecated); `run --config FILE.yaml` reads flags from a file",
            file=sys.stderr,
            flush=True,
        )
    if "--cpu" in arguments:
        from megatron_patch.upstream.cpu.platform import cpu_arguments

        arguments, said = cpu_arguments(arguments)
        if first_rank:
            print(*said, sep="\n", flush=True)
    return arguments


def run(argv: Sequence[str]) -> None:
    """Run what ``python -m megatron_patch run`` was given; exits the process with code 2 on a user's mistake."""
    if code := exit_code(lambda: _run(argv), speaks=int(os.environ.get("RANK", "0")) == 0):
        sys.exit(code)


def _run(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    path, script, arguments = split_command_line(argv)
    flags = load_yaml(path) if path else {}
    first_on_path(script)
    heart = Heart.of_a_watched_rank()
    if asked_for("cpu", flags, arguments):
        from megatron_patch.upstream.cpu.platform import activate

        activate()
    # Only now: the CPU platform must be up before Megatron is imported.
    from megatron_patch.upstream.patch import Session

    session = Session()
    arguments = megatron_arguments(path, flags, arguments, session)
    if heart:
        from megatron_patch.upstream.heartbeat import heartbeat_hooks

        session.add(heartbeat_hooks(heart))
    sys.argv = [script, *arguments]
    try:
        run_as_main(script)
    except SystemExit as left:  # Megatron's way out at --exit-interval
        if not left.code:
            leave_report()
        raise
    except Exception as error:
        from megatron_patch.upstream.cpu.platform import has_cuda

        if not asked_for("cpu", flags, arguments) and not has_cuda():
            error.add_note("(torch sees no CUDA device on this machine: add --cpu to train on CPU with gloo)")
        raise
    refuse_unread_flags(script, arguments, session)
    leave_report()


def leave_report() -> None:
    """Leave report.html and report.png beside what a run has measured; if that fails, say so and no more."""
    from megatron_patch.upstream.record import measured_folder

    try:
        folder = measured_folder()
        if folder is not None:
            from megatron_patch.report.page import report_on_run

            print(f"> report: {report_on_run(folder)}", flush=True)
    except Exception as error:
        print(f"> no report on this run: {' '.join(str(error).split()) or repr(error)}", file=sys.stderr, flush=True)


def refuse_unread_flags(script: str, arguments: Sequence[str], session: "Session") -> None:
    """To be called at the script's end.

    Raises:
        ConfigError: `arguments` ask for something, and the script never had them validated, so that nothing was done.
    """
    ours, _ = add_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_known_args(arguments)
    if Settings.of(vars(ours)).active and not session.active:
        raise ConfigError(
            "SCRIPT.py",
            script,
            "a script that has its arguments checked by Megatron's parse_and_validate_args or validate_args: "
            "this one did not, and no width-transfer flag had an effect",
            "call one of the two in the script, or drop the flags",
        )


def first_on_path(script: str) -> None:
    """Let modules be looked for beside `script` first, as ``python SCRIPT.py`` does.

    To be called before Megatron is imported: a script in a checkout of Megatron-LM means the Megatron beside it.
    """
    if not sys.flags.safe_path:  # else python puts no folder there, neither for a script nor for a module
        sys.path[0] = os.path.dirname(os.path.realpath(script))


def run_as_main(script: str) -> None:
    """Run the file `script` in the place of this program.

    It becomes ``__main__`` for the rest of the process, so that threads, pickles, spawned workers and what runs at exit
    find its names; `runpy.run_path` would take it away again at the end. A traceback begins with the script's frame.
    """
    path = os.path.join(os.getcwd(), script)  # python spells it so, too: absolute and not normalised
    main = ModuleType("__main__")
    vars(main).update(__file__=path, __cached__=None, __annotations__={}, __builtins__=builtins)
    main.__loader__ = SourceFileLoader("__main__", path)
    sys.modules["__main__"] = main
    if "__mp_main__" in sys.modules:  # multiprocessing is imported: what spawned workers call the module they came from
        sys.modules["__mp_main__"] = main
    code = None
    try:
        with open(path, "rb") as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
        exec(code, vars(main))  # noqa: S102 - running it is what was asked for
    except BaseException:
        hide_frames_above(code)
        raise


def hide_frames_above(code: CodeType | None) -> None:
    """Make an uncaught exception be shown from the frame of `code` on; without a frame, if it has none (syntax errors).

    Who shows it stays with whom the script said. How the process ends is left to python as well.
    """
    show = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        while trace and trace.tb_frame.f_code is not code:
            trace = trace.tb_next
        show(kind, error.with_traceback(trace), trace)

    sys.excepthook = excepthook
