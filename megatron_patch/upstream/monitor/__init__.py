"""The metrics in Megatron's model and training step."""
