"""Building DeepSpeed's engine around Megatron's model, groups of ranks and param groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_patch.config.deepspeed_file import EnginePlan
from megatron_patch.upstream.engine.model import EngineModel
from megatron_patch.upstream.engine.optimizer import EngineOptimizer


class ModelGroups:
    """Megatron's groups of ranks under the names that DeepSpeed asks an ``mpu`` for.

    The module `megatron.core.parallel_state` itself lacks some of them. There must be no
    `initialize_sequence_parallel`, at which DeepSpeed would take ranks out of the data group.
    """

    def __getattr__(self, name: str) -> Any:
        from megatron.core import parallel_state

        if name.startswith("get_model_parallel_"):  # there is no pipeline
            name = name.replace("model_parallel", "tensor_model_parallel")
        if not name.startswith(("get_tensor_model_", "get_pipeline_model_", "get_data_")):
            raise AttributeError(name)
        return getattr(parallel_state, name)


def build_engine(
    plan: EnginePlan, config: Any, model: Sequence[EngineModel], overrides: Mapping[Any, Any]
) -> EngineOptimizer:
    """Build the engine with Megatron's own param groups, let `model` call it, and return it as an optimizer.

    Args:
        plan: what the engine is given.
        config: Megatron's OptimizerConfig.
        model: one chunk.
        overrides: Megatron's `config_overrides`, the width rule's among them.
    """
    from megatron.core.optimizer import _get_param_groups
    from megatron.core.utils import get_model_config
    from megatron.training import print_rank_0

    deepspeed = import_deepspeed()
    (chunk,) = model
    transformer = get_model_config(chunk)
    groups = _get_param_groups(list(model), config, dict(overrides))
    basic = _adam(plan, config, groups)
    _sum_over_tensor_parallel_ranks(chunk, transformer)
    # Megatron's own would reduce what the engine has reduced, or at stage 2 and 3 find no gradients.
    transformer.finalize_model_grads_func = _nothing_to_finalize
    print_rank_0(plan.said())
    engine, *_ = deepspeed.initialize(
        model=chunk.module, optimizer=basic, config=dict(plan.config), mpu=ModelGroups(), dist_init_required=False
    )
    chunk.bind(engine)
    return EngineOptimizer(engine, basic, plan)


def import_deepspeed() -> Any:
    """Return the package, told not to compile what it would compile for communication within a CPU machine.

    `deepspeed.initialize` builds the extension deepspeed_shm_comm on CPU (100 s, and a compiler is needed), which
    serves inference alone (0.19.8).
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _adam(plan: EnginePlan, config: Any, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return AdamW over Megatron's groups, with Megatron's defaults for what a group does not say."""
    common = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
        "weight_decay": config.weight_decay,
    }
    if plan.adam == "cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        cpu: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, **common, adamw_mode=True)
        return cpu
    if plan.adam == "fused":
        from deepspeed.ops.adam import FusedAdam

        fused: torch.optim.Optimizer = FusedAdam(groups, **common, adam_w_mode=True)
        return fused
    return torch.optim.AdamW(groups, **common)


def _sum_over_tensor_parallel_ranks(chunk: torch.nn.Module, config: Any) -> None:
    """Complete the gradients of parameters that every tensor-parallel rank holds and uses for its part alone.

    Megatron does it after the backward pass (`_allreduce_non_tensor_model_parallel_grads`), when ZeRO 2 and 3 have
    taken the gradients away; here each is summed as it comes.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    for name, parameter in chunk.named_parameters():
        if getattr(parameter, "average_gradients_across_tp_domain", False):
            operation = torch.distributed.ReduceOp.AVG
        elif (config.sequence_parallel and getattr(parameter, "sequence_parallel", False)) or (
            config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
        ):
            operation = torch.distributed.ReduceOp.SUM
        else:
            continue

        def reduced(gradient: torch.Tensor, operation: Any = operation) -> torch.Tensor:
            whole = gradient.clone()
            torch.distributed.all_reduce(whole, op=operation, group=group)
            return whole

        if parameter.requires_grad:
            parameter.register_hook(reduced)  # type: ignore[no-untyped-call]


def _nothing_to_finalize(*args: Any, **kwargs: Any) -> None:
    """In the place of Megatron's `finalize_model_grads`."""
