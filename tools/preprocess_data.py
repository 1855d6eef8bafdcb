"""Turn text into a Megatron dataset (.bin and .idx); see docs/data.md."""

import sys

from megatron_patch.entry.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
