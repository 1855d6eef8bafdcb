"""The optimizer that Megatron's loop gets to see: DeepSpeed's engine, with the parameters behind every param group."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_patch.config.deepspeed_file import EnginePlan
from megatron_patch.metrics.views import MasterSlice
from megatron_patch.upstream.monitor.masters import Master
from megatron_patch.upstream.width.groups import schedule_key
from megatron_patch.zero.groups import group_members


class EngineOptimizer:
    """What Megatron's loop needs of an optimizer, in front of DeepSpeed's engine.

    Nothing is remembered from before the engine was built: which model parameters a group trains, and which slice of
    their fp32 weights this rank updates, is read from where DeepSpeed itself reads it when it makes the step.

    Args:
        engine: DeepSpeed's.
        basic: torch's optimizer that the engine was built with.
        plan: how.
    """

    is_stub_optimizer = False

    def __init__(self, engine: Any, basic: torch.optim.Optimizer, plan: EnginePlan) -> None:
        self.engine = engine
        self.plan = plan
        self._norm: float | None = None
        if plan.stage == 0:
            # DeepSpeed clips at stage 0 as well, but tells nobody the norm.
            basic.register_step_pre_hook(lambda *_: self._clip())

    @property
    def optimizer(self) -> Any:
        """What holds the live param groups: DeepSpeed's optimizer, or torch's at stage 0."""
        return self.engine.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The live param groups, with every key that Megatron's groups have."""
        groups: list[dict[str, Any]] = self.engine.optimizer.param_groups
        return groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: the engine's step has cleared the gradients, and no forward pass is repeated."""

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return the loss as it is: bf16 and fp32 need no scale."""
        return loss

    def get_loss_scale(self) -> Tensor:
        """Return 1."""
        return torch.ones(1, device=torch.empty(0, device="cuda").device)

    def step(self) -> tuple[bool, float | None, None]:
        """Make the step; return whether it was made, and the norm of the gradient before clipping.

        Raises:
            RuntimeError: the norm is not finite, under Megatron's --check-for-nan-in-loss-and-grad.
        """
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if self.plan.stage else self._norm
        _require_finite(norm)  # ZeRO has left such a step out
        return bool(self.engine.was_step_applied()), None if norm is None else float(norm), None

    def _clip(self) -> None:
        """Clip as Megatron's FP32Optimizer does, right before torch's step, when gradients are reduced."""
        from megatron.core import parallel_state
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
        from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        counted = [p.grad for p in parameters if param_is_not_tensor_parallel_duplicate(p)]
        group = parallel_state.get_model_parallel_group()
        self._norm = get_grad_norm_fp32(counted, grad_stats_parallel_group=group)
        _require_finite(self._norm)  # before torch makes the step
        if self.plan.clip > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=self.plan.clip, total_norm=self._norm)

    # --- who is in which group --------------------------------------------------------------------------------------

    def group_members(self) -> list[list[torch.nn.Parameter]]:
        """Return the model parameters that each of `param_groups` trains on all ranks together, read from the engine.

        Raises:
            AuditError: the tensor that a group trains is not the flat one that the engine has made of its parameters.
        """
        if self.plan.stage == 0:
            return [list(group["params"]) for group in self.param_groups]
        return group_members(self.engine.optimizer)

    # --- the fp32 weights -------------------------------------------------------------------------------------------

    def find_master(self, parameter: torch.nn.Parameter) -> Master:
        """Return where this rank keeps its slice of the fp32 weights of a model parameter.

        Stage 0: the parameter is the master. Stages 1 and 2: a group's parameters lie one after the other in a flat
        tensor, of which each rank of the data group has an equal part. Stage 3: each parameter is cut into equal parts.
        """
        from megatron.core import parallel_state

        index = self._group_of(parameter)
        key = schedule_key(self.param_groups[index])
        data_group = parallel_state.get_data_parallel_group()
        live = self._hyperparameters(index)
        if self.plan.stage == 0:
            whole = MasterSlice(lambda: parameter.detach().reshape(-1), 0, parameter.numel(), False, live)
            return Master(whole, None, key)
        if self.plan.stage == 3:
            zero, part = self.engine.optimizer, parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
            start = min(data_group.rank() * part, parameter.ds_numel)  # type: ignore[attr-defined]
            stop = min(start + part, parameter.ds_numel)  # type: ignore[attr-defined]
            piece: Callable[[], Tensor] = lambda: zero.get_local_fp32_param(parameter).detach()[: stop - start]  # noqa: E731
        else:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                nothing = MasterSlice(lambda: torch.empty(0, device=parameter.device), 0, 0, True, lambda: (0.0, 0.0))
                return Master(nothing, data_group, "")
            start = mapping.lp_fragment_address.start
            stop = start + mapping.lp_fragment_address.numel
            # Offloaded to the CPU, it is computed with where the weights are.
            piece = lambda: parameter._hp_mapping.hp_fragment.detach().to(parameter.device)  # type: ignore[attr-defined]  # noqa: E731
        if start == stop:
            return Master(MasterSlice(piece, start, stop, True, lambda: (0.0, 0.0)), data_group, "")
        return Master(MasterSlice(piece, start, stop, True, live), data_group, key)

    def _group_of(self, parameter: torch.nn.Parameter) -> int:
        for i, members in enumerate(self.group_members()):
            if any(member is parameter for member in members):
                return i
        raise RuntimeError("a monitored weight is in no param group of the engine")

    def _hyperparameters(self, index: int) -> Callable[[], tuple[float, float]]:
        def read() -> tuple[float, float]:
            group = self.param_groups[index]
            return float(group["lr"]), float(group["weight_decay"])

        return read


def _require_finite(norm: float | Tensor | None) -> None:
    """What Megatron's DDP does with each bucket of gradients, where the engine would go on without a word."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    if norm is not None and get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=float(norm),
            rejection_func=lambda value: not math.isfinite(value),
            message="found NaN or Inf in the gradients",
            fatal=True,
        )
