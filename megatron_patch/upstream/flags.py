"""The argument group "width transfer" in Megatron's own parser, and its way into a `Settings` object."""

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron_patch.config import (
    BASE_DIMENSIONS,
    INIT_SCALINGS,
    SCOPES,
    WARMUPS,
    WIDTH_RULES,
    MetricsConfig,
    Settings,
    WarmupConfig,
    WidthConfig,
    flag,
)
from megatron_patch.errors import ConfigError
from megatron_patch.files.run_json import METRICS_FOLDER
from megatron_patch.metrics.alarm import read_proxy
from megatron_patch.upstream.refusals import _check_optimizer


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every flag of this package to `parser` and return it.

    No flag may be called like a field of Megatron's config dataclasses: Megatron copies such attributes.
    """
    group = parser.add_argument_group(title="width transfer")
    add = group.add_argument
    add("--width-scaling", choices=WIDTH_RULES, default="none", help="rule for LR and weight decay across width")
    add("--base-hidden-size", type=int, help="hidden size of the proxy; required by any rule but none")
    for name, meaning in BASE_DIMENSIONS.items():
        add(flag(f"base_{name}"), type=int, help=f"the proxy's {meaning}; default: the same ratio as the hidden sizes")
    add("--lr-width-exponent", type=float, help="a of lr = base * m^-a; only with --width-scaling custom")
    add("--wd-width-exponent", type=float, help="b of weight decay = base * m^b; only with --width-scaling custom")
    add("--vector-lr", type=float, help="peak LR of embeddings, gains and biases; default: --lr")
    add("--embedding-weight-decay", type=float, help="weight decay of embeddings; default: what the rule says")
    add("--no-scale-output-layer", action="store_true", help="the LM head keeps the base LR and weight decay")
    add("--scale-adam-eps", action="store_true", help="eps = --adam-eps * m^-a")
    add(
        "--init-scaling",
        choices=INIT_SCALINGS,
        default="megatron",
        help="fan-in: std 1/sqrt(own global fan-in) for every linear layer, 1/sqrt(hidden) for embeddings",
    )
    add("--extra-warmup", choices=WARMUPS, default="none", help="factor 1/m -> 1 on top of the LR schedule")
    add("--extra-warmup-iters", type=int, help="length of --extra-warmup exp in optimizer steps")
    add("--extra-warmup-fraction", type=float, help="length of --extra-warmup exp as a fraction of the iterations")
    add(
        "--extra-warmup-scope",
        choices=SCOPES,
        default="all",
        help="all parameters, or only those whose LR or weight decay depends on width",
    )
    add("--alignment-interval", type=int, default=0, help="measure alignment every N iterations; 0 = off")
    add(
        "--alignment-tokens",
        type=int,
        help="sampled tokens per data-parallel rank; default: 1/64 of the rank's tokens in a step, at least 64",
    )
    add("--alignment-layers", default=".*", help="regular expression: only layers whose name matches are measured")
    add("--spectral-interval", type=int, default=0, help="measure top singular values every N iterations; 0 = off")
    add("--metrics-dir", help="folder for our files; default: transfer/ under --save, else under --tensorboard-dir")
    add("--reference-run", help="the proxy's metrics folder: warn where this run's updates are not the proxy's")
    add(
        "--reference-factor",
        type=float,
        default=MetricsConfig.reference_factor,
        help="with --reference-run: how far updates may be from the proxy's, as a factor",
    )
    add(
        "--reference-count",
        type=int,
        default=MetricsConfig.reference_count,
        help="with --reference-run: warn after this many measurements in a row beyond the factor",
    )
    add(
        "--no-report",
        action="store_true",
        help="leave out the report (report.html, report.png) that a run with metrics ends with",
    )
    add(
        "--override-width-scaling",
        action="store_true",
        help="resume although rule, base, exponents, LR or weight decay differ from the checkpoint's",
    )
    add("--cpu", action="store_true", help="run on CPU with gloo; refused where CUDA is present")
    add(
        "--allow-untested-megatron",
        action="store_true",
        help="try a Megatron version that this package was not tested with",
    )
    return parser


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


def settings_from_args(args: Any) -> Settings:
    """Return the settings in Megatron's namespace `args`; an attribute that is absent means its default.

    Raises:
        ConfigError: a setting, or a combination with one of Megatron's own, that cannot be honoured.
    """

    def get(name: str, default: Any = None) -> Any:
        return getattr(args, name, default)

    bases = {name: get(f"base_{name}") for name in BASE_DIMENSIONS}
    rule = get("width_scaling", "none")
    megatrons_mup = bool(get("use_mup", False)) and rule != "none"
    width = WidthConfig(
        rule=rule,
        base_hidden_size=get("base_hidden_size"),
        base_dimensions={name: size for name, size in bases.items() if size is not None},
        lr_exponent=get("lr_width_exponent"),
        wd_exponent=get("wd_width_exponent"),
        vector_lr=get("vector_lr"),
        embedding_weight_decay=get("embedding_weight_decay"),
        # Megatron's own muP never scales the LM head and always scales eps.
        scale_output_layer=not (get("no_scale_output_layer", False) or megatrons_mup),
        scale_adam_eps=get("scale_adam_eps", False) or megatrons_mup,
        init_scaling=get("init_scaling", "megatron"),
        override=get("override_width_scaling", False),
    )
    warmup = WarmupConfig(
        kind=get("extra_warmup", "none"),
        iters=get("extra_warmup_iters"),
        fraction=get("extra_warmup_fraction"),
        scope=get("extra_warmup_scope", "all"),
    )
    metrics = MetricsConfig(
        alignment_interval=get("alignment_interval", 0),
        alignment_tokens=get("alignment_tokens"),
        alignment_layers=get("alignment_layers", ".*"),
        spectral_interval=get("spectral_interval", 0),
        directory=metrics_directory(args),
        record=bool(get("metrics_dir")),
        reference_run=get("reference_run"),
        reference_factor=get("reference_factor", MetricsConfig.reference_factor),
        reference_count=get("reference_count", MetricsConfig.reference_count),
    )
    return Settings(width, warmup, metrics, cpu=get("cpu", False))


# What --use-checkpoint-args brings back: what decides LR, weight decay, eps and initial weights, not what is measured.
# The second are meant for one value of the first and are left alone where the command line gives it another one.
_RESTORED: dict[str, tuple[str, ...]] = {
    "width_scaling": (
        "base_hidden_size",
        *(f"base_{name}" for name in BASE_DIMENSIONS),
        "lr_width_exponent",
        "wd_width_exponent",
        "no_scale_output_layer",
        "scale_adam_eps",
    ),
    "vector_lr": (),
    "embedding_weight_decay": (),
    "init_scaling": (),
    "extra_warmup": ("extra_warmup_iters", "extra_warmup_fraction", "extra_warmup_scope"),
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


def wrap_load_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return Megatron's `load_args_from_checkpoint`, which --use-checkpoint-args calls, bringing back our flags too."""

    @functools.wraps(original)
    def load_args_from_checkpoint(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if isinstance(result, tuple):  # else there was no checkpoint, or none with arguments
            ours, saved = result
            changed = restore_from_checkpoint(ours, saved, sys.argv[1:])
            if changed and ours.rank == 0:
                print(f"> --use-checkpoint-args: {' '.join(changed)} from the checkpoint", flush=True)
        return result

    return load_args_from_checkpoint


def metrics_directory(args: Any) -> str | None:
    """Return the folder for our files: --metrics-dir, else ``transfer/`` under --save, else under --tensorboard-dir."""
    if getattr(args, "metrics_dir", None):
        return str(args.metrics_dir)
    parent = getattr(args, "save", None) or getattr(args, "tensorboard_dir", None)
    return os.path.join(parent, METRICS_FOLDER) if parent else None


def validate(args: Any) -> Settings:
    """Check our flags against each other and against Megatron's, after Megatron's own validation.

    Raises:
        ConfigError: on the first setting that cannot be honoured.
    """
    settings = settings_from_args(args)
    settings.validate()
    try:
        re.compile(settings.metrics.alignment_layers)
    except re.error as error:
        raise ConfigError(
            "--alignment-layers", settings.metrics.alignment_layers, "a regular expression", f"correct it: {error}"
        ) from None
    if settings.metrics.reference_run is not None:
        _check_reference(settings.metrics)
    if settings.active:
        _check_optimizer(args)
        _check_learning_rates(args, settings.width)
        _check_initialisation(args, settings.width)
        if getattr(args, "use_mup", False) and settings.width.active:
            _check_mup(args, settings.width)
    if settings.width.override and not getattr(args, "use_checkpoint_opt_param_scheduler", False):
        # Megatron's scheduler compares its own peak LR and weight decay with the checkpoint's and would refuse.
        args.override_opt_param_scheduler = True
    return settings


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
    exponent = {"standard": 1.0, "independent": 1.0, "sqrt-decay": 1.0, "no-decay": 1.0}.get(width.rule)
    if width.rule == "custom":
        exponent = width.lr_exponent
    if exponent != 1.0:
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
