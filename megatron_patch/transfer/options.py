"""What the user of a transfer asked for."""

from dataclasses import dataclass

from megatron_patch.theory.transfer import BatchRule


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    rule: str | None = None
    base_hidden_size: int | None = None
    weight_decay: float | None = None
    """Use the trials with this weight decay; where the sweep has no such column, its weight decay."""
    vector_lr: float | None = None
    """Use the trials with this vector LR."""
    steps: int | None = None
    """Use the trials of this length."""
    extra_warmup: str | None = None
    extra_warmup_fraction: float | None = None
    ema_timescale: bool = False
    batch_lr: BatchRule | None = None
    depth_lr: bool = False
    force: bool = False
