"""One Bridge run: its plan, its scheduler, the audits, and what it leaves behind."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_patch.bridge.doors import close_doors
from megatron_patch.config import Settings
from megatron_patch.errors import AuditError
from megatron_patch.files.run_json import RunRecord, Status
from megatron_patch.metrics.writers import log_scalars
from megatron_patch.upstream.agreement import check_agreement
from megatron_patch.upstream.monitor.monitor import AlignmentMonitor, watch
from megatron_patch.upstream.ranks import collectively
from megatron_patch.upstream.record import begin_files, hyperparameter_table, writing
from megatron_patch.upstream.width.audit import (
    CHECKPOINT_KEYS,
    adopt_live_groups,
    audit_build,
    check_checkpoint,
)
from megatron_patch.upstream.width.classes import ParameterClass, live_values, parameter_classes, summary
from megatron_patch.upstream.width.planned import PlannedRun, plan_run
from megatron_patch.upstream.width.scheduler import STATE_KEY, scheduler_class


class BridgeRun:
    """What `megatron_patch run` does in Megatron's loop, at the places where Bridge calls. All calls are collective.

    Args:
        args: Megatron's arguments and ours; `iteration` and `curr_iteration` are kept in it.
        config: the OptimizerConfig.
        model: Megatron's model chunks.

    Raises:
        AuditError: on all ranks, if the rule scales nothing.
        ConfigError: the ranks differ in what they are about to train.
    """

    def __init__(self, args: Namespace, config: Any, model: Sequence[torch.nn.Module]) -> None:
        from megatron.training import print_rank_0

        self._args = args
        self._settings = Settings.of(vars(args))
        check_agreement(args, self._settings.allow_rank_differences, print_rank_0)
        self.plan = plan_run(self._settings, args, config, model)
        self._planned: PlannedRun | None = None
        self._begun = False
        self._monitor: AlignmentMonitor | None = None
        self._record: RunRecord | None = None
        self._classes: tuple[ParameterClass, ...] = ()
        self._writers: tuple[Any, Any] = (None, None)
        self._told: set[str] = set()

    def make_scheduler(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what Bridge trains with in the place of an `OptimizerParamScheduler`; audits the optimizer first.

        Raises:
            AuditError: on all ranks, if the optimizer of one does not hold the plan.
        """
        run = self

        class BridgeScheduler(scheduler_class(self._settings, lambda: self._args)):  # type: ignore[misc]
            def step(self, increment: int) -> None:
                if increment > 0 and not self._loading and not run._begun:
                    raise AuditError(
                        "megatron_patch was not told that training began: give pretrain the callbacks that "
                        "megatron_patch.bridge.apply returned, pretrain(cfg, forward_step, callbacks=callbacks)"
                    )
                super().step(increment)

            def state_dict(self) -> dict[str, Any]:
                state: dict[str, Any] = super().state_dict()
                # Bridge keeps no arguments in a checkpoint; these are compared before the next load.
                compared = {key: getattr(run._args, key, default) for key, default in CHECKPOINT_KEYS}
                state[STATE_KEY] = {**state.get(STATE_KEY, {}), "arguments": compared}
                return state

        collectively(lambda: audit_build(self.plan, optimizer))
        if self._settings.override:
            adopt_live_groups(optimizer)
        self._planned = PlannedRun(self.plan, optimizer)
        return BridgeScheduler(optimizer, *args, **kwargs)

    def check_checkpoint(self, loaded: Any) -> None:
        """Compare a checkpoint with this run before anything of it is loaded.

        Args:
            loaded: what Bridge's `_load_base_checkpoint` returned.

        Raises:
            ConfigError: other hyperparameters.
        """
        from megatron.training import print_rank_0

        state_dict, _, release, _ = loaded
        saved = _arguments_in(state_dict, self._args)
        if saved is None:
            return
        weights_only = bool(release or self._args.finetune or self._args.no_load_optim)
        note = check_checkpoint(saved, self._args, self.plan, weights_only)
        if note and note not in self._told:  # Bridge reads more than once
            print_rank_0(note)
            self._told.add(note)

    def begin(self, model: Any, optimizer: Any, scheduler: Any, iteration: int, writers: tuple[Any, Any]) -> None:
        """Audit what was built and loaded, and begin what is written along the way.

        Args:
            model: Megatron's model chunks.
            optimizer: the live one.
            scheduler: the live one.
            iteration: completed before.
            writers: Bridge's TensorBoard and W&B writers, None where this rank has none.

        Raises:
            AuditError: the optimizer does not hold the plan, or was built without it.
            ConfigError: a folder that cannot be written to; no layer matches --alignment-layers.
        """
        from megatron.training import print_rank_0

        close_doors()
        if self._planned is None or self._planned.optimizer is not optimizer:
            raise AuditError(
                "the optimizer or its scheduler was not built by Bridge's setup_optimizer, where every parameter gets "
                "its LR and weight decay; use Bridge's pretrain, or do not call megatron_patch.bridge.apply"
            )
        args, metrics = self._args, self._settings.metrics
        args.iteration, self._writers, directory = iteration, writers, metrics.directory
        self.audit(scheduler)
        table = hyperparameter_table(self.plan, optimizer)
        self._classes = parameter_classes(self.plan, optimizer)
        for line in summary(self.plan, self._classes):
            print_rank_0(line)
        if directory is None:
            print_rank_0("> no metrics_dir, cfg.checkpoint.save or cfg.logger.tensorboard_dir: no run.json written")
        else:
            self._record = collectively(lambda: begin_files(directory, table, args))
        if metrics.active and directory is not None:
            log = self._log
            monitor = collectively(
                lambda: writing(
                    directory, lambda: AlignmentMonitor(metrics, model, self.plan.parameters, optimizer, args, log)
                )
            )
            scheduler.carry(monitor.forecast, monitor.flush)
            watch(monitor, optimizer)
            self._monitor = monitor
        self._begun = True

    def audit(self, scheduler: Any) -> None:
        """Hold the live optimizer and scheduler to the plan.

        Raises:
            AuditError: on all ranks, if those of one do not.
        """
        assert self._planned is not None
        self._planned.audit(self._planned.optimizer, scheduler, self._args)

    def begin_step(self, iteration: int) -> None:
        """Before a step; `iteration` are completed."""
        self._args.curr_iteration = iteration

    def end_step(self, iteration: int, losses: Mapping[str, Any], scheduler: Any) -> None:
        """After a step.

        Args:
            iteration: completed, this one included.
            losses: of the step, reduced.
            scheduler: the live one.

        Raises:
            AuditError: with audit_interval, the optimizer no longer holds the plan.
        """
        assert self._planned is not None
        if self._settings.audit_interval and iteration % self._settings.audit_interval == 0:
            self.audit(scheduler)
        if iteration % self._args.tensorboard_log_interval == 0 and any(self._writers):
            values = live_values(self._classes, self._planned.optimizer)
            scalars = {f"lr/{label}": lr for label, (lr, _) in values.items()}
            self._log(scalars | {f"weight_decay/{label}": decay for label, (_, decay) in values.items()}, iteration)
        if self._record is not None and iteration % self._args.log_interval == 0:
            self._record.trained(iteration, _floats(losses))

    def evaluated(self, on: str, iteration: int, losses: Mapping[str, Any]) -> None:
        """After an evaluation: its losses go into run.json."""
        if self._record is not None and losses:
            self._record.evaluated(iteration, on, _floats(losses))

    def end(self) -> None:
        """When Bridge's training loop is through: write what was measured last."""
        if self._monitor is not None:
            self._monitor.flush()
        if self._record is not None:
            self._record.ended(Status.FINISHED)

    def _log(self, values: Mapping[str, float], iteration: int) -> None:
        log_scalars(values, iteration, *self._writers)


def _floats(losses: Mapping[str, Any]) -> dict[str, float]:
    """Return losses, of which Bridge keeps some as tensors of one element."""
    return {name: float(torch.as_tensor(value).flatten()[0]) for name, value in losses.items()}


def _arguments_in(state_dict: Any, ours: Namespace) -> Namespace | None:
    """Return the arguments that a checkpoint was trained with; None if it does not say.

    Of a checkpoint from before this package Megatron's scheduler knows LR and weight decay; what nothing in it tells is
    taken to be as in this run.
    """
    state_dict = state_dict or {}
    if "args" in state_dict:
        return Namespace(**vars(state_dict["args"]))
    scheduler = state_dict.get("opt_param_scheduler")
    if scheduler is None:
        return None
    if "arguments" in scheduler.get(STATE_KEY, {}):
        return Namespace(**scheduler[STATE_KEY]["arguments"])
    told = {"lr": "max_lr", "min_lr": "min_lr", "start_weight_decay": "start_wd", "end_weight_decay": "end_wd"}
    rest = ("use_mup", "adam_eps", "optimizer", "muon_scale_mode", "muon_extra_scale_factor", "muon_scalar_optimizer")
    return Namespace(
        **{name: getattr(ours, name) for name in rest if hasattr(ours, name)},
        **{name: scheduler[key] for name, key in told.items() if key in scheduler},
    )
