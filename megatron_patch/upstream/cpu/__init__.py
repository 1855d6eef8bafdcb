"""Megatron on a CPU: what stands in for CUDA."""
