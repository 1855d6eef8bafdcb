"""What a width rule does not cover: comparing the proxy's training with the target's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.config.pattern import depth, pattern_of
from megatron_patch.config.sizes import chosen_by_megatron
from megatron_patch.files.yaml_flags import attributes
from megatron_patch.runs.trial import Trial

_RUN = "train a proxy that has the target's"
CHECKS: dict[str, tuple[str, str]] = {
    "depth": ("layers", f"{_RUN} depth, give --depth-lr, or --force"),
    "head size": ("head size", f"{_RUN} head size (more heads, not larger ones), or --force"),
    "batch": ("sequences a step", f"{_RUN} batch, give --batch-lr or --ema-timescale, or --force"),
    "tokens": ("training tokens", f"{_RUN} number of tokens, give --ema-timescale, or --force"),
    "sequence length": ("sequence length", f"{_RUN} sequence length, or --force"),
    "decay style": ("LR schedule", f"{_RUN} schedule, or --force"),
    "warmup": ("part of the training that is LR warmup", f"{_RUN} schedule, or --force"),
    "decay": ("part of the training over which the LR decays", f"{_RUN} schedule, or --force"),
    "floor": ("minimum LR", f"{_RUN} schedule, or --force"),
    "tokenizer": ("tokenizer", f"{_RUN} tokenizer, or --force"),
    "vocabulary": ("vocabulary size", f"{_RUN} tokenizer, or --force"),
    "optimizer": ("optimizer", f"{_RUN} optimizer, or --force"),
    "adam_beta1": ("--adam-beta1", f"{_RUN} betas, or --force"),
    "adam_beta2": ("--adam-beta2", f"{_RUN} betas, or --force"),
    "init_scaling": ("--init-scaling", f"{_RUN} initialisation, or --force"),
}
TOLERANCE = 0.02
"""Relative; numbers closer than this are equal."""


@dataclass(frozen=True)
class Difference:
    """One thing in which proxy and target differ."""

    name: str
    text: str
    fix: str
    refuses: bool
    """False where too little is known of the proxy for more than a warning."""


@dataclass(frozen=True)
class Training:
    """What is compared of a run; a value that is unknown is absent."""

    values: Mapping[str, Any]
    complete: bool = True
    """Whether the whole command line is known."""

    @classmethod
    def of_flags(cls, flags: Mapping[str, Any]) -> "Training":
        """Read a config's flags (with dashes), absent ones being Megatron's defaults."""
        return cls(_values(attributes(flags)))

    @classmethod
    def of_proxy(cls, used: Sequence[Trial], proxy: Mapping[str, Any] | None) -> "Training":
        """Read what a run recorded, else the proxy's config, else what a CSV row says."""
        if used[0].arguments:
            return cls(_values(used[0].arguments))
        if proxy is not None:
            return cls.of_flags(proxy)
        return cls({} if used[0].steps is None else {"steps": used[0].steps}, complete=False)


def _values(a: Mapping[str, Any]) -> dict[str, Any]:
    def get(name: str, default: Any = None) -> Any:
        value = a.get(name)
        return default if value is None else value

    hidden, heads = _number(get("hidden_size")), _number(get("num_attention_heads"))
    head = _number(get("kv_channels")) or (hidden / heads if hidden and heads else None)
    batch, length = _number(get("global_batch_size")), _number(get("seq_length"))
    steps, samples = _number(get("train_iters")), _number(get("train_samples"))
    if samples is None and steps is not None and batch is not None:
        samples = steps * batch
    whole = samples if _number(get("train_samples")) is not None else steps
    unit = "samples" if _number(get("train_samples")) is not None else "iters"
    warmup, decay = _number(get(f"lr_warmup_{unit}", 0)), _number(get(f"lr_decay_{unit}")) or whole
    fraction = _number(get("lr_warmup_fraction"))
    found = {
        "depth": depth(a) if pattern_of(a) else _number(get("num_layers")),
        "head size": head,
        "batch": batch,
        "steps": steps,
        "tokens": samples * length if samples and length else None,
        "sequence length": length,
        "decay style": get("lr_decay_style", "linear"),
        "warmup": fraction if fraction is not None else warmup / whole if warmup is not None and whole else None,
        "decay": decay / whole if decay and whole else None,
        "floor": bool(_number(get("min_lr", 0))),
        "tokenizer": get("tokenizer_type"),
        "vocabulary": get("vocab_size"),
        "optimizer": get("optimizer", "adam"),
        "adam_beta1": _number(get("adam_beta1", 0.9)),
        "adam_beta2": _number(get("adam_beta2", 0.999)),
        "init_scaling": get("init_scaling", "megatron"),
        "kv_projection_size": round(head * heads) if head and heads else None,
    }
    for name in (
        "ffn_hidden_size",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "moe_latent_size",
        "q_lora_rank",
        "kv_lora_rank",
    ):
        found[name] = a.get(name)
    if hidden and math.isfinite(hidden):
        left_out = [name for name in ("ffn_hidden_size", "moe_ffn_hidden_size") if found[name] is None]
        found |= chosen_by_megatron(a, left_out, int(hidden), found["ffn_hidden_size"])
    if a.get("multi_latent_attention"):
        value = _number(get("v_head_dim", 128))
        found["head size"], found["kv_projection_size"] = value, round(value * heads) if value and heads else None
    return {name: value for name, value in found.items() if value is not None}


def _number(value: Any) -> float | None:
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def differences(base: Training, here: Training) -> list[Difference]:
    """Return in what proxy and target differ beside width, as far as both are known."""
    found = []
    for name, (what, fix) in CHECKS.items():
        if name in base.values and name in here.values and not _alike(base.values[name], here.values[name]):
            shown = [_shown(t.values[name]) for t in (base, here)]
            found.append(Difference(name, f"{what}: {shown[0]} in the proxy, {shown[1]} in the target", fix, True))
    if not base.complete:
        steps = base.values.get("steps"), here.values.get("steps")
        if None not in steps and not _alike(*steps):
            text = f"training steps: {_shown(steps[0])} in the proxy, {_shown(steps[1])} in the target"
            found.append(Difference("tokens", text, "check that the tokens agree; see --ema-timescale", False))
        unknown = "depth, head size, batch, tokens, schedule and tokenizer of the proxy are not recorded in a CSV"
        found.append(
            Difference("unknown", unknown, "check that they are the target's, or give --proxy PROXY.yaml", False)
        )
    return found


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(a, bool):
        return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))
    return bool(a == b)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "above 0" if value else "0"
    return f"{value:.6g}" if isinstance(value, (int, float)) else str(value)
