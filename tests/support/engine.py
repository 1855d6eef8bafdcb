"""Runs of tests/support/training.py on DeepSpeed's engine, and on Megatron's DDP and optimizer to compare with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.training import TINY, Patched, Run

WIDTH = ("--width-scaling", "sqrt", "--base-hidden-size", "16", "--vector-lr", "2e-2", "--weight-decay", "0.1")
LOSSES = 20
RUN = (*TINY, *WIDTH, "--clip-grad", "0.5")
"""Three param groups of different LR and weight decay, clipped at every step."""


def ds_json(folder: Path, stage: int, **more: Any) -> list[str]:
    """Write a DeepSpeed file and return the flags that use it; at stage 3 every parameter is really partitioned."""
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    zero.update(more.pop("zero_optimization", {}))
    path = folder / f"ds{stage}-{len(list(folder.glob('ds*.json')))}.json"
    path.write_text(json.dumps({"zero_optimization": zero, **more}))
    return ["--deepspeed", "--deepspeed-config", str(path)]


@dataclass
class Watched(Patched):
    """A run with the patch that notes what its optimizer holds: LR and weight decay of every parameter, every step."""

    groups: list[dict[str, tuple[float, float, float]]] = field(default_factory=list)

    def built(self, run: Run) -> None:
        self.note(run)

    def stepped(self, run: Run, iteration: int, losses: dict[str, float]) -> None:
        self.note(run)

    def note(self, run: Run) -> None:
        from megatron_patch.upstream.width.audit import live_groups
        from tests.support.training import global_names

        names = {id(parameter): name for name, parameter in global_names(run.model).items()}
        self.groups.append(
            {
                names[id(parameter)]: (group["lr"], group["weight_decay"], group["eps"])
                for group, parameters in live_groups(run.optimizer)
                for parameter in parameters
            }
        )

    def result(self, run: Run) -> Any:
        return self.groups, full_weights(run)


def full_weights(run: Run) -> dict[str, Any]:
    """This tensor-parallel rank's fp32 weights after the run, whole over the data-parallel ranks; a collective call."""
    from tests.support.training import global_names

    names = global_names(run.model)
    if not hasattr(run.optimizer, "engine"):
        from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

        found = {name: parameter.detach().float() for name, parameter in names.items()}
        for child in run.optimizer.chained_optimizers:
            if isinstance(child, Float16OptimizerWithFloat16Params):
                of = {id(p): name for name, p in names.items()}
                for models, masters in zip(child.float16_groups, child.fp32_from_float16_groups, strict=True):
                    found.update({of[id(p)]: master.detach() for p, master in zip(models, masters, strict=True)})
        return {name: value.numpy().copy() for name, value in sorted(found.items())}
    from deepspeed.utils import safe_get_full_fp32_param

    whole = {}
    for name, parameter in sorted(names.items()):
        full = safe_get_full_fp32_param(parameter)
        whole[name] = (parameter if full is None else full).detach().float().numpy().copy()
    return whole


def argv(*flags: Sequence[str]) -> list[str]:
    """One command line of several pieces."""
    return [word for piece in flags for word in piece]
