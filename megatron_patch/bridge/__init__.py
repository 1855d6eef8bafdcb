"""Width scaling, extra warmups and metrics in NVIDIA's Megatron-Bridge, through its own doors.

    import megatron_patch.bridge

    cfg, callbacks = megatron_patch.bridge.apply(
        cfg, width_scaling="sqrt", base_hidden_size=256, extra_warmup="decay-away", alignment_interval=100
    )
    pretrain(cfg, forward_step, callbacks=callbacks)

The names are those of the flags, with underscores (docs/bridge.md).
"""

try:
    import megatron.bridge  # noqa: F401
except ModuleNotFoundError as error:
    _missing = error.name or str(error)
    raise ModuleNotFoundError(
        "megatron_patch.bridge needs Megatron-Bridge 0.6, which cannot be imported in this Python "
        f"(no module named {_missing}); pip install megatron-bridge==0.6.2, or use `megatron-patch run` with "
        "Megatron's own scripts",
        name=error.name,
    ) from None

from megatron_patch.bridge.apply import apply
from megatron_patch.bridge.callback import TransferCallback
from megatron_patch.bridge.provider import WidthScalingProvider

__all__ = ["TransferCallback", "WidthScalingProvider", "apply"]
