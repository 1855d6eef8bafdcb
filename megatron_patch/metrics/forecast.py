"""The weight-norm recurrence, run along with the live schedule of every param group."""

import math
from collections.abc import Mapping
from copy import copy
from typing import Any

from megatron_patch.config.pattern import as_in_gpt
from megatron_patch.theory.equilibrium import decay_per_step, next_rho


class NormForecast:
    """Predicts the RMS of every monitored weight from its initial RMS and the learning rates and decays since then.

    The recurrence `rho_{t+1}^2 = (1 - eta_t lambda_t)^2 rho_t^2 + b^2 eta_t^2` is linear in rho^2, so all layers of a
    param group share two numbers: `rho_t = sqrt((shrink * rho_0)^2 + (b * growth)^2)`. A step costs a few float
    operations a group.

    Args:
        group_of: param group of every layer, by a key that all ranks share.
        initial_rms: RMS of the entries of every layer's weight at the start.
        update_rms: b of every layer, the RMS of its updates at a learning rate of 1; 1 where a layer is not in it. None
            for a layer whose updates have no known size: nothing is predicted for it.
        pattern: of a hybrid model, which may go on from the checkpoint of a GPT, where its layers have other names.

    Source: arXiv 2510.19093, eq. 30.
    """

    def __init__(
        self,
        group_of: Mapping[str, str],
        initial_rms: Mapping[str, float],
        pattern: str | None = None,
        update_rms: Mapping[str, float | None] | None = None,
    ) -> None:
        self._pattern = pattern
        self._update_rms = dict(update_rms or {})
        self._group_of = dict(group_of)
        self._initial_rms = dict(initial_rms)
        self._factors = dict.fromkeys(group_of.values(), (1.0, 0.0))

    def step(self, hyperparameters: Mapping[str, tuple[float, float]]) -> None:
        """Advance by one optimizer step that was made.

        Args:
            hyperparameters: learning rate and weight decay of the step by group key; other groups are ignored.
        """
        for group, (shrink, growth) in self._factors.items():
            lr, weight_decay = hyperparameters[group]
            shrink *= 1 - decay_per_step(lr, weight_decay)
            self._factors[group] = (shrink, next_rho(growth, lr, weight_decay))

    def weight_rms(self, layer: str) -> float | None:
        """Return the predicted RMS of a layer's weight before the coming step; None for a layer that is not tracked."""
        b = self._update_rms.get(layer, 1.0)
        if layer not in self._initial_rms or b is None:
            return None
        shrink, growth = self._factors[self._group_of[layer]]
        return math.hypot(shrink * self._initial_rms[layer], b * growth)

    def relative_update(self, layer: str, lr: float) -> float | None:
        """Return the predicted relative update of the coming step, `b eta / rho`; None where nothing is predicted."""
        rms, b = self.weight_rms(layer), self._update_rms.get(layer, 1.0)
        return b * lr / rms if rms and b is not None and lr > 0 else None

    def snapshot(self) -> "NormForecast":
        """Return one that stays as this one is now."""
        kept = copy(self)
        kept._factors = dict(self._factors)
        return kept

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, the same on every rank, for a checkpoint."""
        return {"initial_rms": dict(self._initial_rms), "factors": {g: list(f) for g, f in self._factors.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; layers or groups it does not know start anew."""
        saved = state["initial_rms"]
        of_gpt = not self._initial_rms.keys() <= saved.keys()  # some names are in both, and mean other layers
        names = {layer: as_in_gpt(layer, self._pattern) if of_gpt else layer for layer in self._initial_rms}
        known = {layer: saved[name] for layer, name in names.items() if name in saved}
        groups = {group: tuple(f) for group, f in state["factors"].items() if group in self._factors}
        if set(known) == set(self._initial_rms) and set(groups) == set(self._factors):
            self._initial_rms, self._factors = known, groups
