"""Every hook into Megatron, and the session that installs them.

`entry_hooks` put the flags into Megatron's parser and check them; what else is installed depends on what was asked for
(`feature_hooks`), so that without any of our flags Megatron runs as it is.
"""

import argparse
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from megatron_patch.config import Settings
from megatron_patch.config.arguments import add_arguments
from megatron_patch.errors import AuditError
from megatron_patch.upstream import flags
from megatron_patch.upstream.agreement import check_agreement
from megatron_patch.upstream.datasets import skip_compile_helpers
from megatron_patch.upstream.engine.back_end import BackEnd
from megatron_patch.upstream.hooks import Hook, Installation, after, around, install
from megatron_patch.upstream.monitor.monitor import AlignmentMonitor, watch
from megatron_patch.upstream.ranks import collectively
from megatron_patch.upstream.record import Recorder, writing
from megatron_patch.upstream.width.planned import PlannedRun

_TRAINING = "megatron.training.training"


def megatron_parser() -> argparse.ArgumentParser:
    """Return a parser with the arguments Megatron gives every script, ours included where the hooks are installed."""
    from megatron.training import arguments

    parser: argparse.ArgumentParser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return parser


class Session:
    """What is installed in this process: first `entry_hooks`, later what the flags ask for. Nobody else installs."""

    def __init__(self) -> None:
        self.installed: list[Installation] = []
        self.active = False
        """Whether the flags were checked and asked for something."""

    def begin(self, prepare_parser: Callable[[argparse.ArgumentParser], None] = lambda parser: None) -> None:
        """Install the hooks that every run has; `prepare_parser` is called with every parser that Megatron makes.

        Raises:
            UpstreamChanged: Megatron cannot be hooked, or is already; nothing is installed then.
        """
        self.add(entry_hooks(self, prepare_parser))

    def add(self, hooks: Sequence[Hook]) -> None:
        """Install `hooks` on top of what is there.

        Raises:
            UpstreamChanged: Megatron cannot be hooked, or is already; nothing of `hooks` is installed then.
        """
        self.installed.append(install(hooks))

    def apply(self, settings: Settings) -> None:
        """Install what the flags ask for."""
        self.add(feature_hooks(settings))
        self.active = True

    def check(self) -> None:
        """Make sure that `remove` can restore everything.

        Raises:
            UpstreamChanged: somebody replaced one of our replacements in the meantime.
        """
        for installation in self.installed:
            installation.check()

    def remove(self) -> None:
        """Restore every original, the last replaced first. Twice is harmless.

        Raises:
            UpstreamChanged: somebody replaced one of our replacements in the meantime; nothing is restored then.
        """
        self.check()
        while self.installed:
            self.installed.pop().remove()
        self.active = False


def entry_hooks(
    session: Session, prepare_parser: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> tuple[Hook, ...]:
    """Return the hooks that are always installed; those that the flags ask for, `session` adds later.

    They are the parser, the validation, the arguments in a checkpoint, and the build of the dataset helpers.

    Args:
        session: told the settings once they are known.
        prepare_parser: called with every parser that Megatron makes.
    """

    parsers: list[argparse.ArgumentParser] = []  # making another one takes longer than all that is done here

    def no_default(name: str) -> None:
        """A script without Megatron's parser has given every size itself."""

    def add_ours(call: Callable[[], Any], parser: Any) -> Any:
        prepare_parser(parser)
        parser = add_arguments(call())
        flags.mend_help(parser)
        parsers.append(parser)
        return parser

    def check_arguments(call: Callable[[], Any], args: Any) -> Any:
        validated, settings = flags.validate_around(call, args, parsers[-1].get_default if parsers else no_default)
        if settings.active:
            session.apply(settings)
        return validated

    return (
        Hook(
            "megatron.training.arguments:add_megatron_arguments",
            ("parser",),
            around(add_ours, "parser"),
            "add our flags",
        ),
        Hook(
            "megatron.training.arguments:validate_args", ("args",), around(check_arguments, "args"), "check our flags"
        ),
        Hook(
            "megatron.core.datasets.utils:compile_helpers",
            (),
            skip_compile_helpers,
            "train from the wheel, which has the helpers compiled and no Makefile",
        ),
        Hook(
            "megatron.training.checkpointing:load_args_from_checkpoint",
            (),
            after(flags.restore),
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
            around(run.build_optimizer, "config", "model_chunks", "config_overrides"),
            "give every parameter its LR and weight decay",
            # Other ways to an optimizer (inference, tests); the trainer looks its own name up.
            also_bound_in=("megatron.core.optimizer",),
        ),
        Hook(
            f"{_TRAINING}:OptimizerParamScheduler",
            ("optimizer", "init_lr", "max_lr"),
            run.scheduler,
            "multiply the LR schedule",
            also_bound_in=("megatron.core.optimizer_param_scheduler", "megatron.training.checkpointing"),
        ),
        Hook(
            "megatron.training.checkpointing:_load_base_checkpoint",
            (),
            after(run.check_checkpoint),
            "refuse a checkpoint with other hyperparameters",
        ),
        Hook(
            f"{_TRAINING}:setup_model_and_optimizer",
            (),
            after(run.set_up),
            "audit the optimizer after a load",
        ),
        Hook(
            f"{_TRAINING}:training_log",
            ("loss_dict", "iteration"),
            after(run.log, "iteration", "loss_dict"),
            "log LR and weight decay per class",
        ),
        Hook(f"{_TRAINING}:evaluate", (), after(run.evaluated), "keep the losses of an evaluation"),
        Hook(
            f"{_TRAINING}:evaluate_and_print_results",
            ("prefix", "iteration"),
            around(run.evaluate, "prefix", "iteration"),
            "record evaluations in run.json",
        ),
        Hook(f"{_TRAINING}:train", (), around(run.train), "record the end of training in run.json"),
        *(run.engine.hooks() if run.engine else ()),
    )


class _Run:
    """Hands what Megatron does to those whose it is: a planned run once there is an optimizer, then its recorder.

    Megatron may do without either (evaluation alone), and reads checkpoints before it has an optimizer.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.engine = BackEnd(settings.engine.file) if settings.engine.active and settings.engine.file else None
        self._audit: Callable[[], None] = lambda: None
        self._planned: PlannedRun | None = None
        self._recorder: Recorder | None = None
        self._scheduler: Any = None
        self._flush: Callable[[], None] = lambda: None
        self._told: set[str] = set()

    def build_optimizer(self, call: Callable[..., Any], config: Any, model: Any, overrides: Any) -> Any:
        from megatron.training import get_args, print_rank_0

        check_agreement(get_args(), self._settings.allow_rank_differences, print_rank_0)
        if self.engine:
            call = self.engine.build(config, model)
        self._planned = PlannedRun.build(self._settings, call, config, model, overrides)
        return self._planned.optimizer

    def scheduler(self, original: Any) -> Any:
        from megatron.training import get_args

        from megatron_patch.upstream.width.scheduler import scheduler_class

        self._scheduler = scheduler_class(self._settings, get_args)
        return self._scheduler

    def check_checkpoint(self, loaded: Any) -> None:
        from megatron.training import print_rank_0

        note = self._planned.check_checkpoint(loaded) if self._planned else None
        if self._scheduler and loaded[0] and "args" in loaded[0]:
            self._scheduler.begins = getattr(loaded[0]["args"], "extra_warmup", "none") == "none"
        if note and note not in self._told:  # Megatron reads more than once
            print_rank_0(note)
            self._told.add(note)

    def set_up(self, built: Any) -> None:
        """Audit what was built and loaded, and begin what is written along the way; a collective call.

        Raises:
            AuditError: the optimizer does not hold the plan, or was built without one.
        """
        from megatron.training import get_args

        model, optimizer, scheduler = built
        planned, metrics, args = self._planned, self._settings.metrics, get_args()
        if optimizer is None:
            return
        if planned is None:  # a script that builds its optimizer in another way would train without the rule, unseen
            raise AuditError(
                "the optimizer was not built by get_megatron_optimizer, where every parameter gets its LR and weight "
                "decay; let Megatron's setup_model_and_optimizer build it, or drop the width-transfer flags"
            )
        planned.audit(optimizer, scheduler, args)
        self._audit = lambda: planned.audit(optimizer, scheduler, args)
        self._recorder = Recorder(planned, optimizer, metrics.directory, args)
        directory = metrics.directory
        if metrics.active and directory is not None:
            parameters = planned.plan.parameters
            monitor = collectively(
                lambda: writing(directory, lambda: AlignmentMonitor(metrics, model, parameters, optimizer, args))
            )
            scheduler.carry(monitor.forecast, monitor.flush)
            self._flush = monitor.flush
            watch(monitor, optimizer)

    def log(self, _: Any, iteration: int, losses: dict[str, Any]) -> None:
        """After every iteration.

        Raises:
            AuditError: with --audit-interval, the optimizer no longer holds the plan.
        """
        if self._settings.audit_interval and iteration % self._settings.audit_interval == 0:
            self._audit()
        if self._recorder:
            self._recorder.logged(iteration, losses)

    def evaluated(self, result: Any) -> None:
        if self._recorder:
            self._recorder.evaluated(result)

    def evaluate(self, call: Callable[[], Any], prefix: str, iteration: int) -> Any:
        return self._recorder.evaluating(call, prefix, iteration) if self._recorder else call()

    def train(self, call: Callable[[], Any]) -> Any:
        return self._recorder.training(lambda: self._to_the_end(call)) if self._recorder else call()

    def _to_the_end(self, call: Callable[[], Any]) -> Any:
        """Train, and write what was measured last, however it ends."""
        try:
            result = call()
        except BaseException:
            with contextlib.suppress(Exception):  # a device that is lost has no sums to read; the first error counts
                self._flush()
            raise
        self._flush()
        return result
