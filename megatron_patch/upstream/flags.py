"""Our flags in Megatron's own parser and namespace, and what of Megatron's contradicts them."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

from megatron_patch.config import MetricsConfig, Settings, WarmupConfig, WidthConfig, flag, options_of
from megatron_patch.config.arguments import add_arguments
from megatron_patch.config.deepspeed_file import mistakes
from megatron_patch.errors import ConfigError, raise_together
from megatron_patch.metrics.alarm import read_proxy
from megatron_patch.upstream.refusals import Feature, refused
from megatron_patch.upstream.width.bases import settle_bases, sizes_left_out


def refuse_yaml_cfg(words: Sequence[str]) -> None:
    """Raise ConfigError if a command line has one of our flags beside --yaml-cfg, which makes Megatron forget it."""
    given = {word.partition("=")[0] for word in words}
    ours = sorted(given & set(add_arguments(argparse.ArgumentParser(add_help=False))._option_string_actions))
    if "--yaml-cfg" in given and ours:
        raise ConfigError(
            "--yaml-cfg",
            f"with {ours[0]}",
            "no flag beside it: Megatron then takes its settings from that file and forgets the command line",
            "give the flags on the command line, or in a file after `run --config`",
        )


def mend_help(parser: argparse.ArgumentParser) -> None:
    """Escape the per cent signs in those help texts that argparse cannot format.

    Megatron 0.19.2 has such texts, and ``--help`` of every script ends in a ValueError. Can go when
    `test_megatrons_own_help_is_broken` fails.
    """
    formatter = argparse.HelpFormatter(parser.prog)
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")


# What --use-checkpoint-args brings back: what decides LR, weight decay, eps and initial weights, not what is measured.
# The second are meant for one value of the first and are left alone where the command line gives it another one.
_ALONE = ("vector_lr", "embedding_weight_decay", "init_scaling")
_RESTORED: dict[str, tuple[str, ...]] = {
    "width_scaling": tuple(one.name for one in options_of(WidthConfig) if one.name not in ("width_scaling", *_ALONE)),
    **dict.fromkeys(_ALONE, ()),
    "extra_warmup": tuple(one.name for one in options_of(WarmupConfig) if one.name != "extra_warmup"),
}
_EITHER = {"extra_warmup_iters": "extra_warmup_fraction", "extra_warmup_fraction": "extra_warmup_iters"}


def restore_from_checkpoint(args: Any, saved: Any, command_line: Sequence[str]) -> list[str]:
    """Give our flags the values of a checkpoint, but for those that the command line gives itself.

    Args:
        args: Megatron's namespace, not yet validated; changed.
        saved: the checkpoint's.
        command_line: what `args` was parsed from.

    Returns:
        The flags that were changed, with their values, e.g. ``["--width-scaling sqrt"]``.
    """
    given = {word.partition("=")[0] for word in command_line}
    changed = []
    for leader, followers in _RESTORED.items():
        other = flag(leader) in given and getattr(args, leader) != getattr(saved, leader, None)
        for name in (leader,) if other else (leader, *followers):
            spoken_for = {flag(name), flag(_EITHER.get(name, name))} & given
            value = getattr(saved, name, getattr(args, name))
            if not spoken_for and value != getattr(args, name):
                setattr(args, name, value)
                changed.append(flag(name) if value is True else f"{flag(name)} {value}")
    return changed


def restore(loaded: Any) -> None:
    """Bring back our flags after Megatron's `load_args_from_checkpoint`, which --use-checkpoint-args calls.

    Args:
        loaded: what it returned.
    """
    if isinstance(loaded, tuple):  # else there was no checkpoint, or none with arguments
        ours, saved = loaded
        changed = restore_from_checkpoint(ours, saved, sys.argv[1:])
        if changed and ours.rank == 0:
            print(f"> --use-checkpoint-args: {' '.join(changed)} from the checkpoint", flush=True)


def validate_around(megatrons: Callable[[], Any], args: Any, default_of: Callable[[str], Any]) -> tuple[Any, Settings]:
    """Have the arguments validated by Megatron and by us, and return what Megatron's validation does, and our settings.

    What our flags cannot be honoured with is refused before Megatron says what it has against it for other reasons.

    Args:
        megatrons: Megatron's own validation of `args`.
        args: its namespace, parsed from this process's command line; changed by both.
        default_of: its parser's default of an argument.

    Raises:
        ConfigError: on the first setting that cannot be honoured.
    """
    _refuse_together(Settings.of(vars(args)), args)
    left_out = sizes_left_out(args, sys.argv[1:], default_of)
    result = megatrons()
    return result, validate(args, left_out)


def validate(args: Any, left_out: Collection[str] = ()) -> Settings:
    """Check our flags against each other and against Megatron's, after Megatron's own validation.

    Args:
        args: Megatron's namespace; the bases of sizes that were left to Megatron are set in it.
        left_out: which were, see `width.bases.sizes_left_out`.

    Raises:
        ConfigError: on the first setting that cannot be honoured.
    """
    Settings.of(vars(args)).validate()
    for line in settle_bases(args, left_out):
        if args.rank == 0:
            print(f"> {line}", flush=True)
    settings = Settings.of(vars(args))
    settings.validate(getattr(args, "hidden_size", None))
    try:
        re.compile(settings.metrics.alignment_layers)
    except re.error as error:
        raise ConfigError(
            "--alignment-layers", settings.metrics.alignment_layers, "a regular expression", f"correct it: {error}"
        ) from None
    if settings.metrics.reference_run is not None:
        _check_reference(settings.metrics)
    _refuse_together(settings, args)
    if settings.engine.file is not None:
        _run_once(args)
    if settings.active:
        _check_learning_rates(args, settings.width)
        _check_initialisation(args, settings.width)
        if getattr(args, "use_mup", False) and settings.width.active:
            _check_mup(args, settings.width)
    if settings.override and not getattr(args, "use_checkpoint_opt_param_scheduler", False):
        # Megatron's scheduler compares its own peak LR and weight decay with the checkpoint's and would refuse.
        args.override_opt_param_scheduler = True
    return settings


def _refuse_together(settings: Settings, args: Any) -> None:
    """Raise what our flags cannot be honoured with, all at once.

    Raises:
        ConfigError: of Megatron's flags, and of DeepSpeed's file.
    """
    features = {
        Feature.ANY: settings.active,
        Feature.RULE: settings.width.rule != "none",
        Feature.METRICS: settings.metrics.active,
        Feature.ENGINE: settings.engine.active,
    }
    errors = [error for feature, on in features.items() if on for error in refused(feature, vars(args))]
    if settings.engine.active and settings.engine.file is not None:
        errors += mistakes(settings.engine.file, args)
    raise_together(errors)


def _run_once(args: Any) -> None:
    """Keep Megatron from repeating forward and backward passes, whose gradients ZeRO would add to those it has."""
    if getattr(args, "rerun_mode", "disabled") != "disabled":
        if args.rank == 0:
            print("> --deepspeed sets --rerun-mode disabled (ZeRO cannot repeat a backward pass)", flush=True)
        args.rerun_mode = "disabled"


def _check_reference(metrics: MetricsConfig) -> None:
    assert metrics.reference_run is not None
    if metrics.directory and os.path.realpath(metrics.reference_run) == os.path.realpath(metrics.directory):
        raise ConfigError(
            "--reference-run",
            metrics.reference_run,
            "the metrics folder of another run, and this run's own files go there",
            "give the proxy's folder, or another --metrics-dir",
        )
    read_proxy(metrics.reference_run)


def _check_learning_rates(args: Any, width: WidthConfig) -> None:
    if not width.active:
        return
    if args.lr is None or args.lr <= 0:
        raise ConfigError("--lr", args.lr, "a positive base learning rate to scale", "give the proxy's LR")
    if getattr(args, "decoupled_lr", None) is not None:
        raise ConfigError(
            "--decoupled-lr",
            args.decoupled_lr,
            "no second rule for the LR of embeddings and output layer, which the width rule already sets",
            "use --vector-lr for the embeddings and --no-scale-output-layer for the LM head instead",
        )
    if width.vector_lr == 0:
        raise ConfigError("--vector-lr", 0, "a positive learning rate", "freeze parameters in the model instead")


def _check_initialisation(args: Any, width: WidthConfig) -> None:
    if width.init_scaling != "fan-in":
        return
    for name, spelling in (
        ("use_mup", "--use-mup"),
        ("init_method_xavier_uniform", "--init-method-xavier-uniform"),
        ("fp8_param_gather", "--fp8-param-gather"),
        ("fp4_param_gather", "--fp4-param-gather"),
    ):
        if getattr(args, name, False):
            raise ConfigError(
                "--init-scaling",
                "fan-in",
                f"no {spelling}, which decides the initial weights in its own way",
                f"drop {spelling} or --init-scaling fan-in",
            )
    if not getattr(args, "perform_initialization", True):
        raise ConfigError(
            "--init-scaling", "fan-in", "Megatron's initialisation switched on", "drop --no-initialization"
        )


def _check_mup(args: Any, width: WidthConfig) -> None:
    """Megatron scales LR and eps by its one global m; this package then adds the weight decay only."""
    if width.scaling.lr_exponent != 1.0:
        raise ConfigError(
            "--use-mup",
            f"with --width-scaling {width.rule}",
            "a rule whose LR exponent is 1 (standard, independent, sqrt-decay, no-decay): Megatron divides the LR by m",
            "drop --use-mup or choose such a rule",
        )
    base = getattr(args, "mup_base_hidden_size", None)
    if base != width.base_hidden_size:
        raise ConfigError(
            "--mup-base-hidden-size",
            base,
            f"the same as --base-hidden-size {width.base_hidden_size}",
            "give both the hidden size of the proxy",
        )
