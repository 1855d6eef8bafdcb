"""Hybrid models in tests: by hand, which of their names is which of a GPT's."""

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tests.support.monitored import Monitored
from tests.support.reference import scatter_weights
from tests.support.training import Hooks, Patched, Run

MAMBA = tuple("--mamba-head-dim 8 --mamba-state-dim 4 --mamba-num-groups 2".split())


def in_gpt(name: str) -> str:
    """Of a pattern that repeats attention and MLP: layers 2i and 2i+1 are layer i."""
    name = re.sub(r"(?<=decoder\.layers\.)\d+", lambda found: str(int(found[0]) // 2), name)
    return name.replace("decoder.final_norm.", "decoder.final_layernorm.")


def renamed(values: dict[Any, Any]) -> dict[Any, Any]:
    """What is known by name, or by (iteration, name), by the GPT's names."""
    found = {(k[0], in_gpt(k[1])) if isinstance(k, tuple) else in_gpt(k): value for k, value in values.items()}
    assert len(found) == len(values)
    return found


class MonitoredHybrid(Monitored):
    """`Monitored`, with the weights of the float64 reference's GPT."""

    def __init__(self, directory: str, **settings: Any) -> None:
        super().__init__(directory, scatter=False, **settings)

    def built(self, run: Run) -> None:
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config

        from megatron_patch.config import WidthConfig
        from megatron_patch.upstream.width.parameters import describe

        parameters = list(describe(run.model, get_model_config(run.model[0]), WidthConfig(), parallel_state))
        named = [replace(p, spec=replace(p.spec, name=in_gpt(p.spec.name))) for p in parameters]
        scatter_weights(named, run.optimizer, parallel_state, bool(run.args.swiglu))
        super().built(run)


@dataclass
class Groups(Hooks):
    """What every parameter is trained with, read from the live param groups; unmodified Megatron."""

    def built(self, run: Run) -> None:
        from tests.support.building import Built, live

        self.groups = live(Built(run.args, run.model, run.optimizer, run.scheduler))

    def result(self, run: Run) -> Any:
        return self.groups


class PatchedGroups(Patched, Groups):
    """The same with the patch installed."""


class MixerInputs(Patched):
    """What the projections of every Mamba mixer read in the first microbatch of each step, and their weights."""

    def built(self, run: Run) -> None:
        from megatron.core.ssm.mamba_mixer import MambaMixer
        from megatron.core.utils import unwrap_model

        self.steps: list[dict[str, Any]] = []
        self.inputs: dict[str, Any] = {}
        (model,) = unwrap_model(run.model)
        mixers = {name: module for name, module in model.named_modules() if isinstance(module, MambaMixer)}
        self.projections = {
            f"{name}.{part}": getattr(mixer, part) for name, mixer in mixers.items() for part in ("in_proj", "out_proj")
        }
        self.before = self.weights()
        for name, module in self.projections.items():
            module.register_forward_pre_hook(partial(self.note, name))

    def note(self, name: str, _: Any, inputs: tuple[Any, ...]) -> None:
        self.inputs.setdefault(name, inputs[0].detach().clone().flatten(0, 1))

    def weights(self) -> dict[str, Any]:
        return {name: module.weight.detach().clone() for name, module in self.projections.items()}

    def stepped(self, run: Run, iteration: int, losses: dict[str, float]) -> None:
        after = self.weights()
        self.steps.append({name: (self.inputs[name], self.before[name], after[name]) for name in after})
        self.inputs.clear()
        self.before = after

    def result(self, run: Run) -> Any:
        return self.steps
