"""Train a grid of models, or what a sampler chooses, resumably and with any launcher; see docs/sweep.md."""

import argparse
import math
import signal
import sys
from collections.abc import Sequence

from megatron_patch.entry.exits import exit_code
from megatron_patch.entry.parsers import command_parser
from megatron_patch.entry.sweep_check import check_flags
from megatron_patch.errors import ConfigError, ExitCode
from megatron_patch.sweep.engine import run_sweep
from megatron_patch.sweep.file import Search, SweepFile, read_sweep
from megatron_patch.sweep.planned import is_done, to_check
from megatron_patch.sweep.preview import H100_TFLOPS, MFU, Cost, show_sweep

EXAMPLE = """example:
  {started} configs/sweep_example.yaml --dry-run
  {started} configs/sweep_example.yaml --workers 2
trains each trial in OUTPUT/trials/NAME and writes OUTPUT/trials.csv; after Ctrl-C or a crash go on with --resume.
exit code: 0 all trials finished or diverged, 1 some failed, 2 a mistake in the sweep file or in the flags of a trial,
130 interrupted"""
RESUME = "go on with a sweep that was begun, or help another process with it; trials that failed are trained again"
KEEP_GOING = "train the others although the first trials all fail in one and the same way"
NO_CHECK = "do not put the flags of every trial through Megatron's validation before anything starts"
DRY_RUN = "check the flags of every trial, print the trials, their commands and what they cost; write nothing"
PEAK = "peak of one GPU in TFLOP/s, for --dry-run; default: %(default)g, an H100 in bf16"


def parser(started: str) -> argparse.ArgumentParser:
    """Return the parser of the command line; for `started` see `command_parser`."""
    result = command_parser(started, __doc__, EXAMPLE)
    add = result.add_argument
    add("sweep", metavar="SWEEP.yaml", help="base config, axes and output of the sweep")
    add("--workers", type=int, default=1, metavar="N", help="trials to run at a time; default: %(default)s")
    add("--resume", action="store_true", help=RESUME)
    add("--keep-going", action="store_true", help=KEEP_GOING)
    add("--no-check", action="store_true", help=NO_CHECK)
    add("--dry-run", action="store_true", help=DRY_RUN)
    add("--mfu", type=float, default=MFU, metavar="F", help="part of the peak, for --dry-run; default: %(default)g")
    add("--gpu-tflops", type=float, default=H100_TFLOPS, metavar="T", help=PEAK)
    return result


def main(argv: Sequence[str] | None = None, started: str = "python tools/sweep.py") -> int:
    """Do what the command line asks for and return the exit code."""
    args = parser(started).parse_args(argv)
    return exit_code(lambda: _sweep(args), interrupted="nothing was started")


def _sweep(args: argparse.Namespace) -> int:
    for flag, value in (("--mfu", args.mfu), ("--gpu-tflops", args.gpu_tflops)):
        if not 0 < value < math.inf or (flag == "--mfu" and value > 1):
            expected = "above 0 and at most 1" if flag == "--mfu" else "above 0 and finite"
            raise ConfigError(flag, value, f"a number {expected}", "correct it")
    file = read_sweep(args.sweep)
    if args.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
        lines = [] if args.no_check else _cost(file, args.mfu, args.gpu_tflops)
        show_sweep(file)
        print(*lines, sep="\n", end="\n" if lines else "")
        return ExitCode.DONE
    from megatron_patch.transfer.closing import closing  # numpy and scipy, of which --help has no need

    return run_sweep(
        file,
        workers=args.workers,
        resume=args.resume,
        keep_going=args.keep_going,
        before=lambda: None if args.no_check else _check(file),
        ending=lambda trials: closing(trials, args.sweep, file.output),
    )


def _check(file: SweepFile) -> None:
    found = check_flags(file, [trial for trial in to_check(file) if not is_done(file, trial)])
    if isinstance(found, str):
        print(f"the flags of the trials are not checked: {found}", file=sys.stderr, flush=True)


def _cost(file: SweepFile, mfu: float, tflops: float) -> list[str]:
    """Check the flags of every trial and return what all of them cost, in lines."""
    trials = to_check(file)
    found = check_flags(file, trials)
    if isinstance(found, str):
        return [f"the flags of the trials are not checked, nor is their cost known: {found}"]
    notes = list(dict.fromkeys(note for checked in found for note in checked.notes))
    flops = [checked.flops for checked in found if checked.flops is not None]
    lines = [f"the flags of {len(found)} trials are what Megatron and megatron_patch accept"]
    if len(flops) == len(found):
        if isinstance(file.plan, Search):
            total = sum(flops) / len(flops) * file.plan.trials
            cost = Cost(total, total, about=True)
        else:
            left = [f for f, trial in zip(flops, trials, strict=True) if not is_done(file, trial)]
            cost = Cost(sum(flops), sum(left), about=False)
        lines.append(cost.text(mfu, tflops))
        lines.append(
            "  (by Megatron's count, evaluations left out; narrow models reach a smaller part of the peak: "
            "--mfu, --gpu-tflops)"
        )
    return [*lines, *(f"note: {note}" for note in notes)]
