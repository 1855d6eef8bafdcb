"""Try everything on the machine at hand and say line by line what came out; see docs/gpu.md."""

import sys

from megatron_patch.entry.selfcheck import main

if __name__ == "__main__":
    sys.exit(main())
