"""The commands: what `python -m megatron_patch` and `megatron_patch.install()` do."""
