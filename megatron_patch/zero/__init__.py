"""What DeepSpeed's ZeRO keeps of a model, read where it keeps it; for Megatron's loop and for any torch model."""
