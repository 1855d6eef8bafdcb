"""What a run leaves behind: hyperparameters.json, run.json, and LR and weight decay per class in Megatron's writers."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_patch.config import Settings
from megatron_patch.errors import AuditError, ConfigError
from megatron_patch.files.hyperparameters_json import HYPERPARAMETERS_JSON
from megatron_patch.files.run_json import TEST, VALIDATION, RunRecord, Status
from megatron_patch.files.whole import write_json
from megatron_patch.metrics.writers import log_scalars
from megatron_patch.theory.updates import rule_under
from megatron_patch.upstream.ranks import collectively, gather, whereabouts
from megatron_patch.upstream.width.audit import live_groups
from megatron_patch.upstream.width.classes import live_values, parameter_classes, summary
from megatron_patch.upstream.width.plan import Plan
from megatron_patch.upstream.width.planned import PlannedRun


def hyperparameter_table(plan: Plan, optimizer: Any) -> dict[str, Any]:
    """Return the content of hyperparameters.json, the values read from the live groups of every rank; a collective.

    Raises:
        AuditError: a parameter that no rank trains, or replicas of one that are trained differently.
    """
    specs = {id(p.parameter): p.spec for p in plan.parameters}
    live: dict[str, dict[str, Any]] = {}
    for group, parameters in live_groups(optimizer):
        for parameter in parameters:
            name = specs[id(parameter)].name
            live[name] = {
                "lr": group["max_lr"],
                "weight_decay": group["wd_mult"] * plan.weight_decay,
                "eps": group.get("eps", plan.hyperparameters[name].eps),
                "optimizer": group.get("optimizer", plan.optimizer.name),
            }
    merged: dict[str, dict[str, Any]] = {}
    first: dict[str, str] = {}
    """Where the values of each parameter were read."""
    described: dict[str, Any] = {}
    for rank_specs, rank_live, where in gather((list(specs.values()), live, whereabouts())):
        described.update((spec.name, spec) for spec in rank_specs)
        for name, values in rank_live.items():
            if merged.setdefault(name, values) != values:
                raise AuditError(f"{name} is trained with {merged[name]} on {first[name]} and with {values} on {where}")
            first.setdefault(name, where)
    missing = sorted(set(described) - set(merged))
    if missing:
        raise AuditError(f"{missing[0]} is in no param group of any rank: the optimizer does not train it")
    width, rule = plan.width, rule_under(plan.rule, plan.optimizer.of_matrices)
    return {
        "rule": rule.name,
        "exponents": [rule.lr_exponent, rule.wd_exponent],
        "base": {"hidden_size": width.base_hidden_size, **width.base_dimensions},
        "source": rule.source,
        "parameters": [
            {
                "name": name,
                "class": spec.role,
                "shape": list(spec.shape),
                "fan_in": spec.fan_in,
                "base_fan_in": spec.base_fan_in,
                "m": spec.m,
                **merged[name],
            }
            for name, spec in sorted(described.items())
        ],
    }


class Recorder:
    """What one run writes along the way: hyperparameters.json, run.json, LR and weight decay per class.

    Build it once the optimizer is as it will be trained, after a load; the constructor is a collective call.

    Args:
        planned: the run.
        optimizer: the live one, whose values are written down.
        directory: the metrics folder; None: no files, and LR and weight decay to Megatron's own writers alone.
        args: Megatron's.

    Raises:
        AuditError: a parameter is in no param group, or replicas of one are trained differently.
        ConfigError: on all ranks, if the folder cannot be written to.
    """

    def __init__(self, planned: PlannedRun, optimizer: Any, directory: str | None, args: Any) -> None:
        from megatron.training import print_rank_0

        self._planned = planned
        self._losses: list[dict[str, float]] = []
        self._record: RunRecord | None = None
        table = hyperparameter_table(planned.plan, optimizer)
        self._classes = parameter_classes(planned.plan, optimizer)
        # Megatron-FSDP v2 drops the groups of which a rank has no part.
        here = len(live_values(self._classes, optimizer))
        self._scattered = any(one < len(self._classes) for one in gather(here))
        for line in summary(planned.plan, self._classes):
            print_rank_0(line)
        if directory is None:
            print_rank_0(
                "> no --metrics-dir, --save or --tensorboard-dir: hyperparameters.json and run.json not written"
            )
        else:
            self._record = collectively(lambda: begin_files(directory, table, args))

    def logged(self, iteration: int, losses: dict[str, Any]) -> None:
        """After Megatron's `training_log`: LR and weight decay of every class where it logs its own."""
        from megatron.training import get_args, get_tensorboard_writer, print_rank_last
        from megatron.training.global_vars import get_wandb_writer

        args, writer, wandb = get_args(), get_tensorboard_writer(), get_wandb_writer()
        # Where one rank has not all classes, the others must tell it theirs; else only the rank that writes reads them.
        asked = writer or wandb or (self._scattered and (args.tensorboard_dir or args.wandb_project))
        to_writer = asked and iteration % args.tensorboard_log_interval == 0
        to_console = iteration % args.log_interval == 0
        if not (to_writer or to_console):
            return
        values = live_values(self._classes, self._planned.optimizer)
        if self._scattered:
            found = {label: value for rank in gather(values) for label, value in rank.items()}
            values = {one.label: found[one.label] for one in self._classes}
        if to_writer and (writer or wandb):
            scalars = {}
            for label, (lr, weight_decay) in values.items():
                scalars[f"lr/{label}"] = lr
                scalars[f"weight_decay/{label}"] = weight_decay
            log_scalars(scalars, iteration, writer, wandb)
        if to_console:
            texts = (f"{label} {lr:.4e} / {weight_decay:.4g}" for label, (lr, weight_decay) in values.items())
            print_rank_last(f" iteration {iteration:8d} | lr / weight decay: {' | '.join(texts)} |")
            if self._record:
                self._record.trained(iteration, losses)

    def evaluated(self, result: Any) -> None:
        """After Megatron's `evaluate`, which `evaluating` calls once per validation set."""
        self._losses.append({name: float(value) for name, value in (result[0] or {}).items()})

    def evaluating(self, call: Callable[[], Any], prefix: str, iteration: int) -> Any:
        """Around Megatron's `evaluate_and_print_results`: what is evaluated on the way goes into run.json."""
        from megatron.training import get_args

        self._losses = []
        result = call()
        on, args = TEST if "test set" in prefix else VALIDATION, get_args()
        for i, losses in enumerate(self._losses):
            suffix = f"-{(args.validation_set_names or range(i + 1))[i]}" if args.multiple_validation_sets else ""
            if self._record and losses:
                self._record.evaluated(iteration, on + suffix, losses)
        return result

    def training(self, call: Callable[[], Any]) -> Any:
        """Around Megatron's `train`: how it ended goes into run.json."""
        try:
            result = call()
        except BaseException as error:
            if self._record:
                self._record.ended(status_of(error, self._record.content["train_loss"]))
            raise
        if self._record:
            self._record.ended(Status.FINISHED)
        return result


def begin_files(directory: str, table: dict[str, Any], args: Any) -> RunRecord | None:
    """Write hyperparameters.json on the first rank, and begin run.json on the last, which keeps it."""
    from megatron.core import parallel_state

    if args.rank == 0:
        content = {"iteration": args.iteration, **table}
        writing(directory, lambda: write_json(f"{directory}/{HYPERPARAMETERS_JSON}", content))
    if args.rank != args.world_size - 1:
        return None
    layout = {
        "world": args.world_size,
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "context": args.context_parallel_size,
        "expert": args.expert_model_parallel_size,
        "data": parallel_state.get_data_parallel_world_size(),
    }
    return writing(directory, lambda: RunRecord(directory, args, layout, args.iteration))


def writing[Result](directory: str, step: Callable[[], Result]) -> Result:
    """Return what `step`, which begins files in the metrics folder, returns.

    Raises:
        ConfigError: the folder cannot be written to. At the start of a run that is a mistake, not bad luck.
    """
    try:
        return step()
    except OSError as error:
        raise ConfigError(
            "--metrics-dir",
            directory,
            f"a folder for the metrics that can be written to ({error.strerror or error})",
            "make room, correct its permissions, or give another folder",
        ) from None


def status_of(error: BaseException, last_losses: Mapping[str, float] | None) -> Status:
    """Return the status for run.json of a run that `error` ended.

    ``stopped``: Megatron left by itself, as it does at --exit-interval. ``diverged``: a loss or gradient was NaN or Inf
    and, where Megatron repeats the step to tell it from a broken machine, was so again. ``failed``: anything else.

    Megatron's own way out after such a step ends in an arbitrary exception: it saves a checkpoint first, which without
    --save is a TypeError (0.19.2). So its state is asked, not the exception.

    Args:
        error: what left Megatron's `train`.
        last_losses: the training losses last seen; None if there were none.
    """
    from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

    if isinstance(error, SystemExit) and not error.code:
        return Status.STOPPED
    reproduced = (RerunState.WILL_RERUN_FROM_CHECKPOINT, RerunState.RERUNNING_FROM_CHECKPOINT)
    rejected = get_rerun_state_machine().state in reproduced
    # With --rerun-mode disabled the check raises this at once.
    rejected |= isinstance(error, RuntimeError) and "Unexpected result" in str(error)
    rejected |= not all(math.isfinite(loss) for loss in (last_losses or {}).values())
    return Status.DIVERGED if rejected else Status.FAILED


def measured_folder() -> str | None:
    """Return the metrics folder of the training that this process has done.

    None if nothing was measured, on all ranks but the last, which keeps run.json, under --no-report, and if the script
    did not get as far as parsing its arguments.
    """
    from megatron.training.global_vars import get_args

    try:
        args = get_args()
    except AssertionError:  # Megatron's way to say that there are none
        return None
    metrics = Settings.of(vars(args)).metrics
    if not metrics.active or args.rank != args.world_size - 1 or not metrics.report:
        return None
    return metrics.directory
