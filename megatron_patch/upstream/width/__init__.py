"""Width rules in Megatron's param groups and scheduler, and the audit of the live optimizer."""
