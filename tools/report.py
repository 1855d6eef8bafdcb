"""Turn runs or a sweep into one HTML page and a picture, and print how they went and what transferred."""

import argparse
import sys

from megatron_patch.errors import ConfigError
from megatron_patch.report.page import print_summary, write_report
from megatron_patch.report.sweep_section import read_all

EXAMPLE = """examples:
  python tools/report.py runs/quickstart --output runs/quickstart/report.html
  python tools/report.py runs/sweep --output runs/sweep/report.html
The first writes runs/quickstart/report.html and, beside it, report.png; with --output x.png only the picture."""
RUN = (
    "folder of a run (its --save folder or --metrics-dir) or one above several runs, also running ones; the output "
    "folder of a sweep; or a CSV table of trials (hidden_size, lr, loss, ...)"
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    result.add_argument("runs", nargs="+", metavar="RUN_OR_SWEEP", help=RUN)
    result.add_argument("--output", required=True, metavar="FILE", help="report.html, or overview.png; replaced")
    return result


def main() -> int:
    """Run the tool and return its exit code."""
    args = parser().parse_args()
    try:
        runs, sweep, notes = read_all(args.runs)
        files = write_report(runs, args.output, sweep, notes)
        print_summary(runs, files, sweep=sweep, notes=notes)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
