"""Train a sentencepiece tokenizer for Megatron on any text; see docs/data.md."""

import sys

from megatron_patch.entry.tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
