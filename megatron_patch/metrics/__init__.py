"""Alignment metrics of sharded linear layers: torch and torch.distributed only, no Megatron."""
