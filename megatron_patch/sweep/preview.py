"""What a sweep would do, shown without doing it."""

from dataclasses import dataclass

from megatron_patch.sweep.attempt import DIVERGED, FINISHED, settled, shown_command
from megatron_patch.sweep.axes import PlannedTrial
from megatron_patch.sweep.file import Search, SweepFile, TwoPhase

H100_TFLOPS = 989.0
"""Peak of an H100 SXM in bf16 without sparsity, in TFLOP/s: NVIDIA's data sheet."""
MFU = 0.4
"""Model FLOPs utilisation: what well-tuned runs of models of 7 billion parameters and more reach. assumed"""


@dataclass(frozen=True)
class Cost:
    """What the runs of a sweep cost together, evaluations left out."""

    flops: float
    to_do: float
    """The part of the trials that are not done."""
    about: bool
    """Whether a sampler will choose the settings, so that this is a mean times the number of trials."""

    def text(self, mfu: float = MFU, tflops: float = H100_TFLOPS) -> str:
        """Return it in words.

        FLOPs / (MFU * peak * 3600 s) = GPU-hours.

        Args:
            mfu: part of the peak that is reached.
            tflops: peak of one GPU, in TFLOP/s.

        >>> Cost(2.848e18, 1.424e18, False).text()
        'cost: 2.85e+18 FLOPs, 2 GPU-hours at 40% of 989 TFLOP/s; of it still to do: 1.42e+18 FLOPs, 1 GPU-hours'
        """
        hours, left = (flops / (mfu * tflops * 1e12 * 3600) for flops in (self.flops, self.to_do))
        total = f"{'about ' if self.about else ''}{self.flops:.3g} FLOPs, {hours:.3g} GPU-hours"
        text = f"cost: {total} at {100 * mfu:.3g}% of {tflops:g} TFLOP/s"
        if self.to_do == self.flops:
            return text
        return f"{text}; of it still to do: {self.to_do:.3g} FLOPs, {left:.3g} GPU-hours"


def show_sweep(file: SweepFile) -> None:
    """Print the trials of a sweep, what each changes, its state and its command. Writes nothing."""
    plan = file.plan
    if isinstance(plan, Search):
        print(f"{plan.trials} trials by the sampler {plan.sampler} over:")
        for dimension in plan.space:
            print(f"  {dimension}")
        print("settings are drawn when a trial starts; the first one's command would be like")
        print(f"  {shown_command(file, PlannedTrial('0000', {}))}")
        return
    if isinstance(plan, TwoPhase):
        _show(file, plan.first)
        print("then, with vector-lr at the best LR of those (its value ends the name):")
        _show(file, plan.second)
        print(f"{len(plan.first)} and {len(plan.second)} trials in {file.output}/trials")
        return
    _show(file, plan)
    print(f"{len(plan)} trials in {file.output}/trials")


def _show(file: SweepFile, trials: tuple[PlannedTrial, ...]) -> None:
    for trial in trials:
        outcome = settled(file.folder(trial))
        state = outcome.kind if outcome and outcome.kind in (FINISHED, DIVERGED) else "to do"
        changes = ", ".join(f"{flag} {'left out' if v is None else v}" for flag, v in trial.changes.items())
        print(f"{trial.name} ({state}): {changes}")
        print(f"  {shown_command(file, trial)}")
