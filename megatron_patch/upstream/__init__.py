"""The only package that imports Megatron, DeepSpeed or Transformer Engine, or assigns to a name of theirs."""
