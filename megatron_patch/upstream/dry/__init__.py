"""Megatron's model without memory or peers, for `explain`."""
