"""Turn the folders of runs into one HTML page and a picture, and print how the runs went."""

import argparse
import sys

from megatron_patch.errors import ConfigError
from megatron_patch.experiments.report import print_summary, write_report
from megatron_patch.experiments.runs import read_runs

EXAMPLE = """example:
  python tools/report.py runs/quickstart --output runs/quickstart/report.html
writes runs/quickstart/report.html and, beside it, report.png; with --output x.png only the picture"""
RUN = "folder of a run (its --save folder or --metrics-dir), or one above several runs; a running one can be read too"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    result.add_argument("runs", nargs="+", metavar="RUN", help=RUN)
    result.add_argument("--output", required=True, metavar="FILE", help="report.html, or overview.png; replaced")
    return result


def main() -> int:
    """Run the tool and return its exit code."""
    args = parser().parse_args()
    try:
        runs = read_runs(args.runs)
        print_summary(runs, write_report(runs, args.output))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
