"""Every hook into Megatron, and the state of one training run that they share.

`entry_hooks` put the flags into Megatron's parser and check them; what else is installed depends on what was asked for
(`feature_hooks`), so that without any of our flags Megatron runs as it is.
"""

import argparse
import functools
import inspect
from collections.abc import Callable
from typing import Any

from megatron_patch.config import Settings
from megatron_patch.errors import AuditError
from megatron_patch.files.hyperparameters_json import HYPERPARAMETERS_JSON
from megatron_patch.files.run_json import TEST, VALIDATION, RunRecord, Status
from megatron_patch.files.whole import write_json
from megatron_patch.upstream import flags
from megatron_patch.upstream.datasets import skip_compile_helpers
from megatron_patch.upstream.hooks import Hook, Installation, argument, install
from megatron_patch.upstream.monitor.monitor import AlignmentMonitor, watch
from megatron_patch.upstream.record import (
    ParameterClass,
    hyperparameter_table,
    live_values,
    parameter_classes,
    status_of,
    writing,
)
from megatron_patch.upstream.width.audit import (
    adopt_live_groups,
    agree_on_errors,
    audit_build,
    audit_groups,
    audit_schedule,
    check_checkpoint,
)
from megatron_patch.upstream.width.parameters import describe
from megatron_patch.upstream.width.plan import Plan, config_overrides, initialise_by_fan_in, make_plan

_TRAINING = "megatron.training.training"


def megatron_parser() -> argparse.ArgumentParser:
    """Return a parser with the arguments Megatron gives every script, ours included where the hooks are installed."""
    from megatron.training import arguments

    parser: argparse.ArgumentParser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return parser


def entry_hooks(
    installed: list[Installation], prepare_parser: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> tuple[Hook, ...]:
    """Return the hooks that are always installed; those that the flags ask for are added to `installed` later.

    They are the parser, the validation, the arguments in a checkpoint, and the build of the dataset helpers.

    Args:
        installed: collects what is installed once the flags are known.
        prepare_parser: called with every parser that Megatron makes.
    """

    def wrap_parser(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def add_megatron_arguments(parser: Any) -> Any:
            prepare_parser(parser)
            parser = flags.add_arguments(original(parser))
            flags.mend_help(parser)
            return parser

        return add_megatron_arguments

    def wrap_validation(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def validate_args(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            namespace = argument(original, "args", args, kwargs)
            settings = flags.validate(namespace)
            if settings.active:
                installed.append(install(feature_hooks(settings)))
            return result

        return validate_args

    return (
        Hook("megatron.training.arguments:add_megatron_arguments", ("parser",), wrap_parser, "add our flags"),
        Hook("megatron.training.arguments:validate_args", ("args",), wrap_validation, "check our flags"),
        Hook(
            "megatron.core.datasets.utils:compile_helpers",
            (),
            skip_compile_helpers,
            "train from the wheel, which has the helpers compiled and no Makefile",
        ),
        Hook(
            "megatron.training.checkpointing:load_args_from_checkpoint",
            (),
            flags.wrap_load_args,
            "bring back our flags with --use-checkpoint-args",
        ),
    )


def feature_hooks(settings: Settings) -> tuple[Hook, ...]:
    """Return the hooks for what `settings` asks for."""
    run = _Run(settings)
    return (
        Hook(
            f"{_TRAINING}:get_megatron_optimizer",
            ("config", "model_chunks", "config_overrides"),
            run.wrap_optimizer,
            "give every parameter its LR and weight decay",
            # Other ways to an optimizer (inference, tests); the trainer looks its own name up.
            also_bound_in=("megatron.core.optimizer",),
        ),
        Hook(
            f"{_TRAINING}:OptimizerParamScheduler",
            ("optimizer", "init_lr", "max_lr"),
            run.wrap_scheduler,
            "multiply the LR schedule",
            also_bound_in=("megatron.core.optimizer_param_scheduler", "megatron.training.checkpointing"),
        ),
        Hook(
            "megatron.training.checkpointing:_load_base_checkpoint",
            (),
            run.wrap_checkpoint_check,
            "refuse a checkpoint with other hyperparameters",
        ),
        Hook(
            f"{_TRAINING}:setup_model_and_optimizer",
            (),
            run.wrap_setup,
            "audit the optimizer after a load",
        ),
        Hook(
            f"{_TRAINING}:training_log", ("loss_dict", "iteration"), run.wrap_log, "log LR and weight decay per class"
        ),
        Hook(f"{_TRAINING}:evaluate", (), run.wrap_evaluate, "keep the losses of an evaluation"),
        Hook(
            f"{_TRAINING}:evaluate_and_print_results",
            ("prefix", "iteration"),
            run.wrap_evaluate_and_print,
            "record evaluations in run.json",
        ),
        Hook(f"{_TRAINING}:train", (), run.wrap_train, "record the end of training in run.json"),
    )


class _Run:
    """One training run: the plan made when the optimizer is built, and what is written along the way."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.plan: Plan | None = None
        self.optimizer: Any = None
        self.classes: tuple[ParameterClass, ...] = ()
        self.record: RunRecord | None = None
        self.eval_losses: list[dict[str, float]] = []
        self.told: set[str | None] = {None}

    def wrap_optimizer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_megatron_optimizer(*args: Any, **kwargs: Any) -> Any:
            config = argument(original, "config", args, kwargs)
            model = argument(original, "model_chunks", args, kwargs)
            given = argument(original, "config_overrides", args, kwargs)
            plan = self._collectively(lambda: self._make_plan(config, model))
            if given is None:
                from megatron.core.optimizer import get_standard_config_overrides

                given = get_standard_config_overrides(config=config)
            bound = inspect.signature(original).bind(*args, **kwargs)
            bound.arguments["config_overrides"] = {**given, **config_overrides(plan)}
            optimizer = original(*bound.args, **bound.kwargs)
            self._collectively(lambda: audit_build(plan, optimizer))
            if self.settings.override:
                adopt_live_groups(optimizer)
            self.plan, self.optimizer = plan, optimizer
            self.classes = parameter_classes(plan)
            return optimizer

        return get_megatron_optimizer

    def _make_plan(self, config: Any, model: Any) -> Plan:
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config
        from megatron.training import get_args, print_rank_0

        args = get_args()
        model_config = get_model_config(model[0])
        width = self.settings.width
        parameters = list(describe(model, model_config, width, parallel_state))
        for p in parameters:
            if p.assumed and width.rule != "none":
                print_rank_0(
                    f"WARNING: --width-scaling: {p.spec.name} is no layer megatron_patch knows; m = {p.spec.m:g}, "
                    "the ratio of the hidden sizes, is assumed"
                )
        if width.init_scaling == "fan-in":
            initialise_by_fan_in(parameters, model_config)
        if width.active and not args.untie_embeddings_and_output_weights:
            print_rank_0(
                "> the LM head is tied to the word embedding: it belongs to the class embedding and is not scaled"
            )
        return make_plan(
            parameters,
            width,
            config,
            args.end_weight_decay,
            use_mup=bool(getattr(args, "use_mup", False)),
            scope_key=self.settings.warmup.scope == "width-dependent",
        )

    @staticmethod
    def _collectively(step: Callable[[], Any]) -> Any:
        """Run `step`; if it raises on any rank, raise on all."""
        result, error = None, None
        try:
            result = step()
        except (AuditError, ValueError) as caught:
            error = caught
        agree_on_errors(error)
        return result

    def wrap_scheduler(self, original: Callable[..., Any]) -> Callable[..., Any]:
        from megatron.training import get_args

        from megatron_patch.upstream.width.scheduler import scheduler_class

        return scheduler_class(self.settings, get_args)

    def wrap_checkpoint_check(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Compare before Megatron fits what it reads into this run's param groups, where it would find but a misfit."""

        @functools.wraps(original)
        def _load_base_checkpoint(*args: Any, **kwargs: Any) -> Any:
            from megatron.training import get_args, print_rank_0
            from megatron.training.checkpointing import CheckpointType

            state_dict, _, release, kind = result = original(*args, **kwargs)
            ours = get_args()
            if state_dict and "args" in state_dict and self.plan is not None:
                weights_only = bool(release or ours.finetune or ours.no_load_optim)
                legacy = kind == CheckpointType.LEGACY
                note = check_checkpoint(state_dict["args"], ours, self.plan, weights_only, in_groups=legacy)
                if note not in self.told:  # Megatron reads more than once
                    print_rank_0(note)
                    self.told.add(note)
            return result

        return _load_base_checkpoint

    def wrap_setup(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
            model, optimizer, scheduler = result = original(*args, **kwargs)
            if optimizer is not None:
                self._after_setup(model, optimizer, scheduler)
            return result

        return setup_model_and_optimizer

    def _after_setup(self, model: Any, optimizer: Any, scheduler: Any) -> None:
        from megatron.training import get_args, print_rank_0

        args, plan = get_args(), self.plan
        assert plan is not None

        def audit() -> None:
            audit_groups(plan, optimizer)
            audit_schedule(plan, optimizer, scheduler)

        self._collectively(audit)
        table = hyperparameter_table(plan, optimizer)
        for line in _summary(plan, self.classes):
            print_rank_0(line)
        directory = self.settings.metrics.directory
        if directory is None:
            print_rank_0(
                "> no --metrics-dir, --save or --tensorboard-dir: hyperparameters.json and run.json not written"
            )
            return
        self._collectively(lambda: self._begin_files(directory, table, args))
        if self.settings.metrics.active:
            monitor = self._collectively(
                lambda: writing(
                    directory,
                    lambda: AlignmentMonitor(self.settings.metrics, model, plan.parameters, optimizer, args),
                )
            )
            scheduler.carry(monitor.forecast)
            watch(monitor, optimizer)

    def _begin_files(self, directory: str, table: dict[str, Any], args: Any) -> None:
        from megatron.core import parallel_state

        if args.rank == 0:
            content = {"iteration": args.iteration, **table}
            writing(directory, lambda: write_json(f"{directory}/{HYPERPARAMETERS_JSON}", content))
        if args.rank == args.world_size - 1:
            layout = {
                "world": args.world_size,
                "tensor": args.tensor_model_parallel_size,
                "pipeline": args.pipeline_model_parallel_size,
                "context": args.context_parallel_size,
                "expert": args.expert_model_parallel_size,
                "data": parallel_state.get_data_parallel_world_size(),
            }
            self.record = writing(directory, lambda: RunRecord(directory, args, layout, args.iteration))

    def wrap_log(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def training_log(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self._log(argument(original, "iteration", args, kwargs), argument(original, "loss_dict", args, kwargs))
            return result

        return training_log

    def _log(self, iteration: int, losses: dict[str, Any]) -> None:
        from megatron.training import get_args, get_tensorboard_writer, print_rank_last
        from megatron.training.global_vars import get_wandb_writer

        args, writer, wandb = get_args(), get_tensorboard_writer(), get_wandb_writer()
        to_writer = (writer or wandb) and iteration % args.tensorboard_log_interval == 0
        to_console = iteration % args.log_interval == 0
        if not (to_writer or to_console) or self.plan is None:
            return
        values = live_values(self.classes, self.optimizer)
        if to_writer:
            scalars = {}
            for label, (lr, weight_decay) in values.items():
                scalars[f"lr/{label}"] = lr
                scalars[f"weight_decay/{label}"] = weight_decay
            for name, value in scalars.items():
                if writer:
                    writer.add_scalar(name, value, iteration)
            if wandb:
                wandb.log(scalars, iteration)
        if to_console:
            texts = (f"{label} {lr:.4e} / {weight_decay:.4g}" for label, (lr, weight_decay) in values.items())
            print_rank_last(f" iteration {iteration:8d} | lr / weight decay: {' | '.join(texts)} |")
            if self.record:
                self.record.trained(iteration, losses)

    def wrap_evaluate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.eval_losses.append({name: float(value) for name, value in (result[0] or {}).items()})
            return result

        return evaluate

    def wrap_evaluate_and_print(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def evaluate_and_print_results(*args: Any, **kwargs: Any) -> Any:
            from megatron.training import get_args

            self.eval_losses = []
            result = original(*args, **kwargs)
            on = TEST if "test set" in argument(original, "prefix", args, kwargs) else VALIDATION
            ours = get_args()
            for i, losses in enumerate(self.eval_losses):
                suffix = f"-{(ours.validation_set_names or range(i + 1))[i]}" if ours.multiple_validation_sets else ""
                if self.record and losses:
                    self.record.evaluated(argument(original, "iteration", args, kwargs), on + suffix, losses)
            return result

        return evaluate_and_print_results

    def wrap_train(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def train(*args: Any, **kwargs: Any) -> Any:
            try:
                result = original(*args, **kwargs)
            except BaseException as error:
                if self.record:
                    self.record.ended(status_of(error, self.record.content["train_loss"]))
                raise
            if self.record:
                self.record.ended(Status.FINISHED)
            return result

        return train


def _summary(plan: Plan, classes: tuple[ParameterClass, ...]) -> list[str]:
    """Return the lines that tell a user at start what each class is trained with."""
    lines = [f"> width scaling: {plan.rule.name} ({plan.rule.source}); peak LR, weight decay, eps per class:"]
    for c in classes:
        h = c.hyperparameters
        lines.append(f">   {c.label:12s} lr {h.lr:.6g}  weight decay {h.weight_decay:.6g}  eps {h.eps:.3g}")
    return lines
