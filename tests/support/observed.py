"""A run whose every param group, weight and moment is written down, with the patch."""

from dataclasses import dataclass

from megatron_patch.upstream.width.parameters import held_here
from tests.support.training import Hooks, Patched, Run, checksums


@dataclass
class Seen:
    """What a run was trained with: after the load, and after every step."""

    rates: list[list[tuple[str, str]]]  # (LR, weight decay) of every param group, to the last bit
    peaks: list[tuple[float, float]]  # (peak LR, weight decay multiplier) of every param group
    start: dict[str, str]  # digests of the weights before the first step
    moments: float  # sum of the first moments' magnitudes before the first step
    adam_steps: set[float]  # AdamW's step counts before the first step


class Observed(Hooks):
    """Megatron as it is, observed."""

    def built(self, run: Run) -> None:
        states = [
            state
            for child in getattr(run.optimizer, "chained_optimizers", [run.optimizer])
            for state in child.optimizer.state.values()
            if "exp_avg" in state
        ]
        self.seen = Seen(
            rates=[self.rates(run)],
            peaks=sorted((group["max_lr"], group["wd_mult"]) for group in run.optimizer.param_groups),
            start={name: checksum.digest for name, checksum in checksums(run.model).items()},
            moments=sum(float(held_here(state["exp_avg"]).double().abs().sum()) for state in states),
            adam_steps={float(state["step"]) for state in states},
        )

    def stepped(self, run: Run, iteration: int, losses: dict[str, float]) -> None:
        self.seen.rates.append(self.rates(run))

    def result(self, run: Run) -> Seen:
        return self.seen

    @staticmethod
    def rates(run: Run) -> list[tuple[str, str]]:
        groups = sorted(run.optimizer.param_groups, key=lambda group: (group["max_lr"], group["wd_mult"]))
        return [(float(group["lr"]).hex(), float(group["weight_decay"]).hex()) for group in groups]


class ObservedWithPatch(Patched, Observed):
    """The same with the patch installed."""


def bits(numbers: list[float]) -> list[str]:
    return [number.hex() for number in numbers]
