"""The hooks that put DeepSpeed's engine in the place of Megatron's DDP, optimizer and checkpoints of both."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron_patch.config.deepspeed_file import plan_engine
from megatron_patch.upstream.engine.build import build_engine
from megatron_patch.upstream.engine.checkpoint import load, save
from megatron_patch.upstream.engine.model import EngineModel
from megatron_patch.upstream.engine.optimizer import EngineOptimizer
from megatron_patch.upstream.hooks import Hook, around

_TRAINING = "megatron.training.training"


class BackEnd:
    """One run's engine: there is none until Megatron asks for its optimizer.

    Args:
        path: of DeepSpeed's JSON file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._engine: EngineOptimizer | None = None

    def build(self, config: Any, model: Sequence[Any]) -> Callable[..., EngineOptimizer]:
        """Return what is called in the place of Megatron's `get_megatron_optimizer`, with its ``config_overrides``."""

        def built(config_overrides: Any) -> EngineOptimizer:
            from megatron.training import get_args

            self._engine = build_engine(plan_engine(self._path, get_args()), config, model, config_overrides)
            return self._engine

        return built

    def hooks(self) -> tuple[Hook, ...]:
        """Return what is to be installed beside the hooks that every run with a flag of ours has."""
        why = "let DeepSpeed's engine stand where Megatron's DDP would"
        return (
            Hook(
                f"{_TRAINING}:wrap_model_chunks_with_ddp",
                ("model_chunks", "config", "ddp_config"),
                around(_wrap_chunks, "model_chunks", "config", "ddp_config"),
                why,
            ),
            Hook(
                "megatron.training.models.dist_utils:_ddp_wrap",
                ("model", "ddp_config"),
                around(_wrap_model, "model", "ddp_config"),
                why,
            ),
            Hook(
                "megatron.core.pipeline_parallel.schedules:backward_step",
                ("output_tensor",),
                around(self._backward, "output_tensor"),
                "let the engine run the backward pass at ZeRO stage 0, where it asks for it",
            ),
            Hook(
                f"{_TRAINING}:save_checkpoint",
                ("iteration", "model", "optimizer"),
                around(self._save, "iteration"),
                "save the engine's state",
            ),
            Hook(
                f"{_TRAINING}:load_checkpoint",
                ("ddp_model", "optimizer", "load_arg"),
                around(self._load, "load_arg"),
                "load the engine's state",
            ),
        )

    def _backward(self, call: Callable[..., Any], loss: Any) -> Any:
        if self._engine is None or self._engine.plan.stage:
            return call()
        # What else Megatron's function does is for pipelines.
        self._engine.engine.backward(loss[0] if isinstance(loss, list) else loss, scale_wrt_gas=False)
        return None

    def _save(self, call: Callable[..., Any], iteration: int) -> Any:
        return save(call, iteration, self._engine) if self._engine else call()

    def _load(self, call: Callable[..., Any], load_arg: str) -> Any:
        from megatron.training import get_args

        return load(call, getattr(get_args(), load_arg), self._engine) if self._engine else call()


def _wrap_chunks(call: Callable[..., Any], chunks: Sequence[Any], config: Any, ddp_config: Any) -> list[EngineModel]:
    return [EngineModel(chunk, config, ddp_config) for chunk in chunks]


def _wrap_model(call: Callable[..., Any], model: Sequence[Any], ddp_config: Any) -> list[EngineModel]:
    from megatron.core.utils import get_model_config

    return [EngineModel(chunk, get_model_config(chunk), ddp_config) for chunk in model]
