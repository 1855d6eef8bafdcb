"""Turn runs or a sweep into one HTML page and a picture, and print how they went and what transferred."""

import argparse
from collections.abc import Sequence

from megatron_patch.entry.exits import exit_code
from megatron_patch.entry.parsers import command_parser

EXAMPLE = """examples:
  {started} runs/quickstart --output runs/quickstart/report.html
  {started} runs/sweep --output runs/sweep/report.html
The first writes runs/quickstart/report.html and, beside it, report.png; with --output x.png only the picture."""
RUN = (
    "folder of a run (its --save folder or --metrics-dir) or one above several runs, also running ones; the output "
    "folder of a sweep; a CSV table of trials (hidden_size, lr, loss, ...); or a folder of TensorBoard or W&B files"
)


def parser(started: str) -> argparse.ArgumentParser:
    """Return the parser of the command line; for `started` see `command_parser`."""
    result = command_parser(started, __doc__, EXAMPLE)
    result.add_argument("runs", nargs="+", metavar="RUN_OR_SWEEP", help=RUN)
    result.add_argument("--output", required=True, metavar="FILE", help="report.html, or overview.png; replaced")
    return result


def main(argv: Sequence[str] | None = None, started: str = "python tools/report.py") -> int:
    """Do what the command line asks for and return the exit code."""
    args = parser(started).parse_args(argv)

    def act() -> None:
        from megatron_patch.report.page import print_summary, write_report
        from megatron_patch.report.sweep_section import read_all

        runs, sweep, notes = read_all(args.runs)
        files = write_report(runs, args.output, sweep, notes)
        print_summary(runs, files, sweep=sweep, notes=notes)

    return exit_code(act, interrupted="nothing written")
