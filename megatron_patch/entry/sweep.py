"""Train a grid of models, or what a sampler chooses, resumably and with any launcher; see docs/sweep.md."""

import argparse
import signal
from collections.abc import Sequence

from megatron_patch.entry.exits import exit_code
from megatron_patch.entry.parsers import command_parser
from megatron_patch.errors import ExitCode

EXAMPLE = """example:
  {started} configs/sweep_example.yaml --dry-run
  {started} configs/sweep_example.yaml --workers 2
trains each trial in OUTPUT/trials/NAME and writes OUTPUT/trials.csv; after Ctrl-C or a crash go on with --resume.
exit code: 0 all trials finished or diverged, 1 some failed, 2 a mistake in the sweep file, 130 interrupted"""
RESUME = "go on with a sweep that was begun, or help another process with it; trials that failed are trained again"


def parser(started: str) -> argparse.ArgumentParser:
    """Return the parser of the command line; for `started` see `command_parser`."""
    result = command_parser(started, __doc__, EXAMPLE)
    add = result.add_argument
    add("sweep", metavar="SWEEP.yaml", help="base config, axes and output of the sweep")
    add("--workers", type=int, default=1, metavar="N", help="trials to run at a time; default: %(default)s")
    add("--resume", action="store_true", help=RESUME)
    add("--dry-run", action="store_true", help="print the trials and their commands; write nothing")
    return result


def main(argv: Sequence[str] | None = None, started: str = "python tools/sweep.py") -> int:
    """Do what the command line asks for and return the exit code."""
    args = parser(started).parse_args(argv)

    def act() -> int:
        from megatron_patch.sweep.engine import run_sweep
        from megatron_patch.sweep.file import read_sweep
        from megatron_patch.sweep.preview import show_sweep

        file = read_sweep(args.sweep)
        if args.dry_run:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
            show_sweep(file)
            return ExitCode.DONE
        return run_sweep(file, workers=args.workers, resume=args.resume)

    return exit_code(act, interrupted="nothing was started")
