"""``python -m megatron_patch``."""

from megatron_patch.entry.main import main

if __name__ == "__main__":
    main()
