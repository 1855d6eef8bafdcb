"""Try everything on the machine at hand, a GPU's or not, and say line by line what was compared and what came out."""

import argparse
import signal
from collections.abc import Sequence

from megatron_patch.entry.exits import exit_code
from megatron_patch.entry.parsers import command_parser
from megatron_patch.errors import ConfigError, ExitCode

EXAMPLE = """examples:
  {started} --output runs/selfcheck
  {started} --cpu --quick --output /tmp/selfcheck
Needs no network and no data. On a GPU it is done within ten minutes; what the machine cannot do is left out and named.
In the folder: selfcheck.json (rewritten whenever a line has been judged), selfcheck.html, trace.json.gz, and the log of
every run. Exit code 1 if a line failed. What to do with the file: docs/gpu.md."""


def parser(started: str) -> argparse.ArgumentParser:
    """Return the parser of the command line; for `started` see `command_parser`."""
    result = command_parser(started, __doc__, EXAMPLE)
    result.add_argument(
        "--output", default="runs/selfcheck", metavar="DIR", help="default: runs/selfcheck; a new folder"
    )
    result.add_argument("--cpu", action="store_true", help="leave GPUs alone")
    result.add_argument("--quick", action="store_true", help="small models and few steps; leaves lines out")
    result.add_argument(
        "--only", metavar="REGEX", help="judge only lines whose name matches, and make their runs alone"
    )
    result.add_argument(
        "--seconds", type=float, metavar="S", help="for everything; what is late fails; default: 570, on a CPU 3600"
    )
    return result


def main(argv: Sequence[str] | None = None, started: str = "python tools/gpu_selfcheck.py") -> int:
    """Do what the command line asks for and return the exit code."""
    args = parser(started).parse_args(argv)

    def act() -> int:
        from megatron_patch.entry.run import DEFAULT_SCRIPT
        from megatron_patch.report.selfcheck_page import line_text, print_selfcheck
        from megatron_patch.selfcheck.check import Check, Options

        if args.seconds is not None and not args.seconds > 0:
            raise ConfigError("--seconds", args.seconds, "a number > 0", "give the time for everything")
        options = Options(args.output, args.cpu, args.quick, args.only, args.seconds, DEFAULT_SCRIPT)
        found = Check(options, lambda line: print(line_text(line), flush=True)).run()
        print_selfcheck(found)
        print(f"page: {args.output}/selfcheck.html\nfile: {args.output}/selfcheck.json")
        return ExitCode.DONE if found.passed else ExitCode.FAILED

    # As at Ctrl-C: the runs are in sessions of their own, and would go on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return exit_code(act, interrupted=f"what was found by then is in {args.output}/selfcheck.json")
