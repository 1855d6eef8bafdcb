"""The model chunk that Megatron's loop gets to see: in the place of its DDP wrapper, calling DeepSpeed's engine."""

from typing import Any

import torch


class EngineModel(torch.nn.Module):
    """A model that Megatron would have wrapped in DDP; its forward pass is the engine's, once there is one.

    Args:
        module: the model, in Megatron's Float16Module with --bf16.
        config: its TransformerConfig.
        ddp_config: what Megatron's DDP would have got; Megatron reads it off the wrapper.
    """

    engine: Any

    def __init__(self, module: torch.nn.Module, config: Any, ddp_config: Any) -> None:
        super().__init__()
        self.module = module
        self.config = config
        self.ddp_config = ddp_config
        self.force_all_reduce = False
        # Not as a submodule: the engine is one itself and holds the same model.
        object.__setattr__(self, "engine", None)

    def bind(self, engine: Any) -> None:
        """Call `engine` from now on."""
        object.__setattr__(self, "engine", engine)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the engine makes of the model's inputs."""
        return self.engine(*args, **kwargs)

    def train(self, mode: bool = True) -> "EngineModel":
        """Set the mode of the model, and what the engine notes of it."""
        super().train(mode)
        if self.engine is not None:
            self.engine.train(mode)
        return self

    # What Megatron's loop asks of its DDP and the engine does by itself, in its step or in the backward pass.

    def zero_grad_buffer(self) -> None:
        """Do nothing: the engine's step has cleared the gradients."""

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Do nothing: the engine reduces gradients in the backward pass or in its step, by the stage."""

    def broadcast_params(self) -> None:
        """Do nothing: the engine has broadcast the parameters when it was built."""
