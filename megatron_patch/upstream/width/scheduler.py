"""Megatron's scheduler times the extra warmup factor, with the factor's state in the checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_patch.config import Settings
from megatron_patch.errors import ConfigError
from megatron_patch.metrics.forecast import NormForecast
from megatron_patch.theory.schedules import decay_away, decay_away_step, exp_increasing

STATE_KEY = "megatron_patch"


@dataclass(frozen=True)
class ExtraWarmup:
    """What the scheduler multiplies Megatron's schedule with."""

    kind: str = "none"
    scope: str = "all"
    m: float = 1.0
    """Width multiplier of the hidden size."""
    steps: int = 0
    """T_W of exp, in optimizer steps."""
    accept_other_checkpoints: bool = False


class WidthTransferScheduler(OptimizerParamScheduler):  # type: ignore[misc]
    """`OptimizerParamScheduler` whose LR is multiplied by the extra warmup factor f_t.

    Optimizer steps are counted by this class, t = 0 for the first update, because Megatron's `num_steps` counts samples
    and the batch size may ramp up. Skipped updates (fp16 overflow) do not call `step`, so they do not count.

    Source: arXiv 2510.19093, eqs. 14 (exp) and 15 (decay-away).
    """

    init_lr: float
    begins = False
    """The checkpoint that is about to be loaded has no state of a warmup: Megatron fills in what `state_dict` has, and
    with the format of its FSDP stops at what the checkpoint lacks."""

    def __init__(self, *args: Any, warmup: ExtraWarmup, **kwargs: Any) -> None:
        # Before the base class, whose constructor computes the first LR.
        self.warmup = warmup
        self.optimizer_steps = 0
        self.decay_product = 1.0
        self._loading = False
        self._forecast: NormForecast | None = None
        self._loaded_forecast: dict[str, Any] | None = None
        self._before_saving: Callable[[], None] = lambda: None
        super().__init__(*args, **kwargs)

    def carry(self, forecast: NormForecast, before_saving: Callable[[], None] = lambda: None) -> None:
        """Continue `forecast` from the checkpoint that was loaded, if any, and save its state in all to come.

        Args:
            forecast: a live one.
            before_saving: called whenever a checkpoint is about to be saved, on every rank.
        """
        self._before_saving = before_saving
        if self._loaded_forecast is not None:
            forecast.load_state_dict(self._loaded_forecast)
        self._forecast = forecast

    def factor(self) -> float:
        """Return f_t of the coming optimizer step: 1/m at the start, 1 in the end, never above 1."""
        if self.warmup.kind == "exp":
            return exp_increasing(self.optimizer_steps, self.warmup.steps, self.warmup.m)
        if self.warmup.kind == "decay-away":
            return decay_away(self.decay_product, self.warmup.m)
        return 1.0

    def base_lr(self, param_group: dict[str, Any] | None = None) -> float:
        """Return the LR of Megatron's own schedule for a group, without f_t; for no group, that of the base LR."""
        group = param_group or {}
        # init_lr is one number for all groups; scaled like the peak it keeps their ratios during Megatron's warmup.
        init_lr = self.init_lr
        self.init_lr = init_lr * group.get("lr_mult", 1.0)
        try:
            return float(super().get_lr(group))
        finally:
            self.init_lr = init_lr

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Return the LR of a group: Megatron's schedule times f_t."""
        lr = self.base_lr(param_group)
        if self.warmup.scope == "width-dependent" and "width_dependent" not in param_group:
            return lr
        return lr * self.factor()

    def step(self, increment: int) -> None:
        """Advance the schedule by `increment` samples; by one optimizer step, if the increment is not zero."""
        if increment > 0 and not self._loading:
            self.begins = False
            self.decay_product = decay_away_step(self.decay_product, self.base_lr(), self.get_wd())
            self.optimizer_steps += 1
        super().step(increment)

    def state_dict(self) -> dict[str, Any]:
        """Return Megatron's state and, under a key of its own, the warmup's and the forecast's."""
        self._before_saving()
        state: dict[str, Any] = super().state_dict()
        own: dict[str, Any] = {}
        if self.warmup.kind != "none" and not self.begins:
            own["warmup"] = {
                "optimizer_steps": self.optimizer_steps,
                "decay_product": self.decay_product,
                "warmup_steps": self.warmup.steps,
            }
        if self._forecast is not None:
            own["forecast"] = self._forecast.state_dict()
        if own:
            state[STATE_KEY] = own
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore all three.

        Raises:
            ConfigError: the checkpoint has no state of the extra warmup, or one of another length.
        """
        own = state_dict.get(STATE_KEY, {})
        saved = own.get("warmup")
        self._loaded_forecast = own.get("forecast")
        if self.warmup.kind != "none" and self.warmup.m != 1 and not self.warmup.accept_other_checkpoints:
            if saved is None:
                raise ConfigError(
                    "--extra-warmup",
                    self.warmup.kind,
                    "a checkpoint that was saved with it: this one has no state of an extra warmup",
                    "drop the flag, or add --override-width-scaling to start the warmup at this checkpoint",
                )
            if self.warmup.kind == "exp" and saved["warmup_steps"] != self.warmup.steps:
                raise ConfigError(
                    "--extra-warmup-iters/--extra-warmup-fraction",
                    f"= {self.warmup.steps} steps",
                    f"{saved['warmup_steps']} steps, as in the checkpoint",
                    "give the checkpoint's length, or add --override-width-scaling",
                )
        if saved is not None:
            self.optimizer_steps = saved["optimizer_steps"]
            self.decay_product = saved["decay_product"]
        # The base class replays the whole past as one step, which is no optimizer step.
        self._loading = True
        try:
            super().load_state_dict(state_dict)
        finally:
            self._loading = False
        # It also writes the LRs before it restores the weight-decay schedule.
        self.step(0)


def scheduler_class(settings: Settings, get_args: Callable[[], Any]) -> type[WidthTransferScheduler]:
    """Return what replaces Megatron's scheduler class: one whose constructor has the same parameters.

    Args:
        settings: the warmup and the rule.
        get_args: Megatron's `get_args`, called when the scheduler is built.
    """

    class ConfiguredScheduler(WidthTransferScheduler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            arguments = get_args()
            warmup = ExtraWarmup(
                kind=settings.warmup.kind,
                scope=settings.warmup.scope,
                m=arguments.hidden_size / (settings.width.base_hidden_size or arguments.hidden_size),
                # Now: for --train-samples Megatron has only just worked it out, batch-size ramp-up included.
                steps=settings.warmup.steps(int(arguments.train_iters)) or 0,
                accept_other_checkpoints=settings.override,
            )
            super().__init__(*args, warmup=warmup, **kwargs)

    return ConfiguredScheduler
