"""DeepSpeed's ZeRO engine under Megatron's own training loop."""
