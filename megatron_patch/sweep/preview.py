"""What a sweep would do, shown without doing it."""

from megatron_patch.sweep.attempt import DIVERGED, FINISHED, settled, shown_command
from megatron_patch.sweep.axes import PlannedTrial
from megatron_patch.sweep.file import Search, SweepFile, TwoPhase


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
