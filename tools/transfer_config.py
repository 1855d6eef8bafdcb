"""Turn the sweep of a proxy into the tuned config of a wide model; see docs/transfer-config.md."""

import sys

from megatron_patch.entry.transfer import main

if __name__ == "__main__":
    sys.exit(main())
