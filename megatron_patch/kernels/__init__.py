"""In plain torch, what Megatron takes from CUDA libraries: norms, and the scan of Mamba 2."""
