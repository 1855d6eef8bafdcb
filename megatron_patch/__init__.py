"""Layer-wise learning-rate and weight-decay transfer across width for NVIDIA Megatron, without touching its source."""

__version__ = "0.1.0"
