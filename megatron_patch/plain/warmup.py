"""The extra warmup of wide models on top of any torch LR schedule, with its state in the checkpoint."""

from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from megatron_patch.errors import ConfigError
from megatron_patch.theory.schedules import decay_away, decay_away_step, exp_increasing

KINDS = ("exp", "decay-away")
SCOPES = ("all", "width-dependent")
_COMPARED = ("kind", "scope", "m", "steps", "weight_decay")


class ExtraWarmup(LRScheduler):
    """A schedule whose LRs are multiplied by a factor f_t that goes from 1/m to 1.

        exp:         f_t = m^min(0, t/T_W - 1)
        decay-away:  f_t = (1 + (m^2 - 1) prod_{tau<t} (1 - eta_tau lambda)^2)^(-1/2)

    t counts calls of `step`, one for each update of the weights. The wrapped scheduler never sees the factor: it finds
    in the groups what it left there. Checkpoint this object alone; it holds the state of the wrapped one.

    Args:
        scheduler: any scheduler, also `ReduceLROnPlateau`, whose `step` then gets what this one's gets.
        kind: "exp" or "decay-away".
        m: width multiplier of the model, its hidden size / that of the proxy, >= 1.
        steps: T_W of exp, in optimizer steps; for no other kind.
        weight_decay: lambda of decay-away, that of the base model, as given to `width_groups`; for no other kind.
        scope: "all" parameters, or only the groups of `width_groups` that are "width-dependent".

    Raises:
        ConfigError: an argument that is missing, out of range or of no use; groups without what it needs of
            `width_groups`.

    Source: arXiv 2510.19093, eqs. 14 (exp) and 15 (decay-away).
    """

    def __init__(
        self,
        scheduler: LRScheduler | ReduceLROnPlateau,
        kind: str,
        *,
        m: float,
        steps: int | None = None,
        weight_decay: float | None = None,
        scope: str = "all",
    ) -> None:
        # Not the base class's: it takes a step, and computes the LRs of a schedule of its own.
        self.optimizer = scheduler.optimizer
        self.scheduler = scheduler
        self.kind, self.scope, self.m, self.steps, self.weight_decay = kind, scope, float(m), steps, weight_decay
        self.optimizer_steps = 0
        self.decay_product = 1.0
        self._check()
        self._unwarmed = self._live()
        self._warm()

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """Of the wrapped scheduler."""
        return int(self.scheduler.last_epoch)

    def factor(self) -> float:
        """Return f_t of the coming optimizer step."""
        if self.kind == "exp":
            return exp_increasing(self.optimizer_steps, self.steps or 0, self.m)
        return decay_away(self.decay_product, self.m)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Go on by one optimizer step; the arguments are the wrapped scheduler's."""
        if self.kind == "decay-away":
            assert self.weight_decay is not None
            self.decay_product = decay_away_step(self.decay_product, self._base_lr(), self.weight_decay)
        self.optimizer_steps += 1
        for group, lr in zip(self.optimizer.param_groups, self._unwarmed, strict=True):
            _set(group, lr)
        self.scheduler.step(*args, **kwargs)
        self._unwarmed = self._live()
        self._warm()

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the LR of each group for the coming step."""
        return [*self._live()]

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """Return the same, as schedulers of torch do."""
        return self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """Return the warmup's state and the wrapped scheduler's, plain numbers."""
        return {
            **{key: getattr(self, key) for key in _COMPARED},
            "optimizer_steps": self.optimizer_steps,
            "decay_product": self.decay_product,
            "unwarmed": list(self._unwarmed),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both, and the LRs of the groups.

        Raises:
            ConfigError: a state of no extra warmup, of one with other arguments, or of other groups.
        """
        for key in _COMPARED:
            if state_dict.get(key, "none saved") != getattr(self, key):
                raise ConfigError(
                    key,
                    getattr(self, key),
                    f"{state_dict.get(key, 'none, since no extra warmup was saved')}, as in the checkpoint",
                    "build ExtraWarmup with the checkpoint's arguments",
                )
        if len(state_dict["unwarmed"]) != len(self.optimizer.param_groups):
            raise ConfigError(
                "optimizer",
                f"with {len(self.optimizer.param_groups)} param groups",
                f"{len(state_dict['unwarmed'])}, as in the checkpoint",
                "build the groups as they were",
            )
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self.optimizer_steps = state_dict["optimizer_steps"]
        self.decay_product = state_dict["decay_product"]
        self._unwarmed = list(state_dict["unwarmed"])
        self._warm()

    def _live(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def _warm(self) -> None:
        f = self.factor()
        for group, lr in zip(self.optimizer.param_groups, self._unwarmed, strict=True):
            own = f if self.scope == "all" or group["width_dependent"] else 1.0
            _set(group, lr * own)
            group["extra_warmup"] = own  # for the audit

    def _base_lr(self) -> float:
        """Return eta_t of the base model, without the factor."""
        for group, lr in zip(self.optimizer.param_groups, self._unwarmed, strict=True):
            if group["lr_mult"] > 0:
                return lr / float(group["lr_mult"])
        return 0.0  # nothing is trained

    def _check(self) -> None:
        groups = self.optimizer.param_groups
        if self.kind not in KINDS:
            raise ConfigError("kind", repr(self.kind), f"one of {', '.join(KINDS)}", "choose one of them")
        if self.scope not in SCOPES:
            raise ConfigError("scope", repr(self.scope), f"one of {', '.join(SCOPES)}", "choose one of them")
        if not 1 <= self.m < float("inf"):
            raise ConfigError(
                "m", self.m, "a number >= 1, hidden size / the proxy's: the factor starts at 1/m", "correct it"
            )
        for name, value, kind in (("steps", self.steps, "exp"), ("weight_decay", self.weight_decay, "decay-away")):
            if (value is None) == (self.kind == kind):
                what = f"a value with kind={kind!r}" if value is None else f"kind={kind!r}, which alone reads it"
                raise ConfigError(name, value, what, "give it" if value is None else "drop it")
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(name, value, "a finite number >= 0", "correct it")
        if any("lr_mult" not in group for group in groups) and (self.kind != "exp" or self.scope != "all"):
            raise ConfigError(
                "scheduler",
                "of param groups without lr_mult",
                f"groups of width_groups with kind={self.kind!r}, scope={self.scope!r}",
                "build the optimizer with width_groups(...)",
            )
        if self.weight_decay is not None:
            for group in groups:
                if group["wd_mult"] > 0 and abs(group["weight_decay"] / group["wd_mult"] - self.weight_decay) > (
                    1e-9 * self.weight_decay
                ):
                    raise ConfigError(
                        "weight_decay",
                        self.weight_decay,
                        f"{group['weight_decay'] / group['wd_mult']:g}, the base model's in the param groups",
                        "give what width_groups was given",
                    )


def _set(group: dict[str, Any], lr: float) -> None:
    """Write an LR, into the tensor where an optimizer keeps one for torch.compile."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
