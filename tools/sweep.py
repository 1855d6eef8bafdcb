"""Train a grid of models, or what a sampler chooses, resumably and with any launcher; see docs/sweep.md."""

import sys

from megatron_patch.entry.sweep import main

if __name__ == "__main__":
    sys.exit(main())
