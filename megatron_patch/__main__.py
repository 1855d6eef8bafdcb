"""``python -m megatron_patch``."""

import sys

from megatron_patch.entry.explain import explain
from megatron_patch.entry.run import USAGE, run


def main() -> None:
    """Hand the command line to the command it names."""
    if sys.argv[1:2] == ["run"]:
        run(sys.argv[2:])
        return
    if sys.argv[1:2] == ["explain"]:
        explain(sys.argv[2:])
        return
    asked = sys.argv[1:] in ([], ["-h"], ["--help"])
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    sys.exit(0 if asked else 2)


if __name__ == "__main__":
    main()
