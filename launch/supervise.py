"""What pretrain.sh and pretrain_multinode.sh hand their command lines to; not a command of its own."""

import sys
from pathlib import Path

# The package beside this folder, whichever is installed: scripts and package belong together.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_patch.entry.supervise import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
