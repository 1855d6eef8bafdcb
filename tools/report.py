"""Turn runs or a sweep into one HTML page and a picture, and print how they went and what transferred."""

import sys

from megatron_patch.entry.report import main

if __name__ == "__main__":
    sys.exit(main())
