"""The one call of a recipe: ConfigContainer in, ConfigContainer and callbacks out."""

import importlib.metadata
from typing import Any

from megatron_patch.bridge.arguments import mistakes, namespace
from megatron_patch.bridge.callback import TransferCallback
from megatron_patch.bridge.doors import check_doors
from megatron_patch.bridge.provider import WidthScalingProvider
from megatron_patch.config import Settings
from megatron_patch.errors import UpstreamChanged, raise_together
from megatron_patch.upstream.hooks import check_version

SUPPORTED_BRIDGE = ("0.6",)
"""Release series of Megatron-Bridge that this is tested with."""


def apply(cfg: Any, **settings: Any) -> tuple[Any, list[TransferCallback]]:
    """Let a Bridge recipe train by a width rule, with an extra warmup and with metrics.

    To be called when the recipe is as it will be trained, and before Bridge's ``pretrain``.

    Args:
        cfg: Bridge's ConfigContainer; its ``optimizer_config_override_provider`` is replaced by one that first asks the
            old one. Its LR and weight decay are the proxy's.
        settings: the flags of ``megatron-patch run``, without dashes and with underscores: ``width_scaling="sqrt",
            base_hidden_size=256, extra_warmup="decay-away", alignment_interval=100, metrics_dir="runs/a"``. A flag that
            takes no value is True or False.

    Returns:
        The same object, and the callbacks for ``pretrain(cfg, forward_step, callbacks=callbacks)``; a run without them
        stops at its first step. With nothing asked for, `cfg` as it was and no callbacks.

    Raises:
        ConfigError: all that is wrong with the settings, by themselves and beside `cfg`, which is unchanged then.
        UpstreamChanged: a Bridge or Megatron that this package was not tested with, or that has no longer what is
            needed of it.
    """
    raise_together(mistakes(cfg, settings))
    args = namespace(cfg, settings)
    read = Settings.of(vars(args))
    if not read.active:
        return cfg, []
    check_version(read.allow_untested_megatron)
    _check_bridge(read.allow_untested_megatron)
    check_doors()
    inner = cfg.optimizer_config_override_provider
    if isinstance(inner, WidthScalingProvider):  # the last call counts
        inner = inner.inner
    provider = WidthScalingProvider(settings=dict(settings), inner=inner)
    provider.attach(cfg)
    cfg.optimizer_config_override_provider = provider
    if read.override and not cfg.scheduler.use_checkpoint_opt_param_scheduler:
        # Megatron's scheduler compares its own peak LR and weight decay with the checkpoint's and would refuse.
        cfg.scheduler.override_opt_param_scheduler = True
    return cfg, [TransferCallback()]


def _check_bridge(allow_untested: bool) -> None:
    version = importlib.metadata.version("megatron-bridge")
    if not allow_untested and not any(version.startswith(f"{series}.") for series in SUPPORTED_BRIDGE):
        raise UpstreamChanged(
            f"megatron-bridge {version}: megatron_patch is tested with {', '.join(SUPPORTED_BRIDGE)} only; install one "
            "of these, or give allow_untested_megatron=True to try"
        )
