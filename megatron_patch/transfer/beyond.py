"""What goes beyond width: factors for batch, depth and tokens, each an option of its own."""

from megatron_patch.errors import ConfigError
from megatron_patch.theory.transfer import (
    BATCH_SOURCES,
    DEPTH_SOURCE,
    EMA_SOURCE,
    batch_lr_factor,
    depth_lr_factor,
    depth_residual_factor,
    weight_decay_factor,
)
from megatron_patch.transfer.checks import Training
from megatron_patch.transfer.options import Options


def beyond_width(
    base: Training, here: Training, options: Options, warnings: list[str]
) -> tuple[float, float, float, set[str], dict[str, str]]:
    """Factors on LR, vector LR and weight decay of the options, the differences they cover, and notes for comments."""
    lr = vector = decay = 1.0
    covered: set[str] = set()
    notes = dict.fromkeys(("lr", "vector-lr", "weight-decay"), "")
    if options.batch_lr:
        factor = batch_lr_factor(options.batch_lr, _ratio("--batch-lr", "batch", base, here))
        lr, vector = lr * factor, vector * factor
        covered.add("batch")
        note = f", times {factor:.4g} for the batch ({options.batch_lr}; {BATCH_SOURCES[options.batch_lr]})"
        notes["lr"] += note
        notes["vector-lr"] += note
    if options.depth_lr:
        ratio = _ratio("--depth-lr", "depth", base, here)
        lr *= depth_lr_factor(ratio)
        covered.add("depth")
        notes["lr"] += f", times {depth_lr_factor(ratio):.4g} for the depth ({DEPTH_SOURCE})"
        notes["vector-lr"] += ", not scaled with depth"
        if ratio != 1:
            warnings.append(
                f"--depth-lr belongs to residual branches multiplied by {depth_residual_factor(ratio):.4g}; "
                "Megatron has no flag for that, so the model's code must do it, and the LM head gets the smaller LR too"
            )
    if options.ema_timescale:
        ratios = _ratio("--ema-timescale", "batch", base, here), _ratio("--ema-timescale", "tokens", base, here)
        decay = weight_decay_factor(*ratios, lr)
        covered |= {"batch", "tokens"}
        notes["weight-decay"] += f", times {decay:.4g} to keep B/(lr * wd * D) ({EMA_SOURCE})"
    if lr != 1:
        warnings.append(f"the target's lr is the proxy's times {lr:.4g}, by the options for batch and depth")
    if decay != 1:
        warnings.append(f"the target's weight-decay is the proxy's times {decay:.4g}, by --ema-timescale")
    return lr, vector, decay, covered, notes


def _ratio(flag: str, name: str, base: Training, here: Training) -> float:
    values = base.values.get(name), here.values.get(name)
    for value, whose, fix in zip(
        values, ("proxy", "target"), ("give --proxy PROXY.yaml", "add the flags to the target's config"), strict=True
    ):
        if not isinstance(value, (int, float)) or value <= 0:
            raise ConfigError(flag, "given", f"the {whose}'s {name} to be known", fix)
    return float(values[1]) / float(values[0])  # type: ignore[arg-type]
