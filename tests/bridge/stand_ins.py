"""What Bridge 0.6 imports and these tests do not use: Transformer Engine and nvidia-resiliency-ext, as empty names.

Neither is installed: the first needs CUDA to be built, and the second is, for older Linux systems, only there in a
version with which Megatron cannot be imported. No layer that trains here comes from them.
"""

import sys
import types
import warnings
from typing import Any


def load() -> None:
    """Put the stand-ins in the place of the two packages. Megatron comes first, so that it does not see them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core.extensions.transformer_engine
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.models.hybrid.hybrid_layer_specs
        import megatron.core.transformer.moe.moe_layer
        import megatron.training.training  # noqa: F401
        import torch

    class AnyClass(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (torch.nn.Module,), {})

    engine, layers = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    engine.__path__, layers.__path__ = [], []  # type: ignore[attr-defined]
    for name in ("Linear", "LayerNormLinear", "GroupedLinear", "TransformerLayer"):
        setattr(layers, name, type(name, (torch.nn.Module,), {}))
    layers.ops = AnyClass("transformer_engine.pytorch.ops")  # type: ignore[attr-defined]
    engine.pytorch = layers  # type: ignore[attr-defined]
    sys.modules.update({"transformer_engine": engine, "transformer_engine.pytorch": layers})

    resiliency, inprocess = types.ModuleType("nvidia_resiliency_ext"), types.ModuleType("inprocess")
    resiliency.__path__, resiliency.__version__ = [], "0.0.0"  # type: ignore[attr-defined]
    inprocess.CallWrapper = type("CallWrapper", (), {})  # type: ignore[attr-defined]
    resiliency.inprocess = inprocess  # type: ignore[attr-defined]
    sys.modules.update(
        {"nvidia_resiliency_ext": resiliency, "nvidia_resiliency_ext.inprocess": inprocess},
    )
