"""DeepSpeed's JSON file: what it may say, what must agree with Megatron's command line, what the engine is given.

Which keys there are is in `deepspeed_keys`; here is what their values must be. Everything that is wrong with a file is
told at once, in a line each.
"""

import copy
import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_patch.config.deepspeed_keys import HARMLESS, PASSED, REFUSED, SAID_TWICE, Keys, Kind
from megatron_patch.errors import ConfigError, raise_together

AUTO = "auto"


@dataclass(frozen=True)
class EnginePlan:
    """What `deepspeed.initialize` is called with."""

    path: str
    config: Mapping[str, Any]
    stage: int
    """Of ZeRO, 0 to 3."""
    adam: Literal["torch", "fused", "cpu"]
    """Whose AdamW: torch's, DeepSpeed's FusedAdam, DeepSpeed's DeepSpeedCPUAdam."""
    clip: float
    """Largest gradient norm; 0 = no clipping."""
    universal: bool
    """Load DeepSpeed's universal checkpoint."""

    def said(self) -> str:
        """Return the line that tells a user what the engine was given."""
        adam = {"torch": "torch's AdamW", "fused": "FusedAdam", "cpu": "DeepSpeedCPUAdam"}[self.adam]
        bf16 = self.config["bf16"]["enabled"]
        sums = self.config.get("data_types", {}).get("grad_accum_dtype") or ("bf16" if bf16 else "fp32")
        micro = self.config["train_micro_batch_size_per_gpu"]
        clip = f"clipping at {self.clip:g}" if self.clip else "no clipping"
        return (
            f"> DeepSpeed engine: ZeRO stage {self.stage}, {adam}, {'bf16' if bf16 else 'fp32'}, gradients summed in "
            f"{sums}, micro batch {micro}, {clip}; accumulation, LR and weight decay are left to Megatron's loop"
        )


_AGREE: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("train_batch_size", "--global-batch-size", lambda args: _batches(args)[0]),
    ("train_micro_batch_size_per_gpu", "--micro-batch-size", lambda args: args.micro_batch_size),
    (
        "gradient_accumulation_steps",
        "--global-batch-size, --micro-batch-size and the data-parallel size",
        lambda args: _batches(args)[1],
    ),
    ("gradient_clipping", "--clip-grad", lambda args: args.clip_grad),
    ("bf16.enabled", "--bf16", lambda args: bool(args.bf16)),
    ("fp16.enabled", "--fp16", lambda args: bool(args.fp16)),
    ("optimizer.params.lr", "--lr", lambda args: args.lr),
    ("optimizer.params.weight_decay", "--weight-decay", lambda args: args.weight_decay),
    ("optimizer.params.betas", "--adam-beta1 and --adam-beta2", lambda args: [args.adam_beta1, args.adam_beta2]),
    ("optimizer.params.eps", "--adam-eps", lambda args: args.adam_eps),
)
"""Key, the flag that says the same, and what that says; None if it is not known yet."""


def _batches(args: Any) -> tuple[int | None, int | None]:
    """Return the global batch and the number of micro batches, for which Megatron's validation fills in what is not
    given."""
    ranks = getattr(args, "data_parallel_size", None) or args.world_size // args.tensor_model_parallel_size
    if not args.micro_batch_size or not ranks:
        return args.global_batch_size, None
    whole = args.global_batch_size or args.micro_batch_size * ranks
    return whole, whole // (args.micro_batch_size * ranks)


_ADAMS = ("adam", "adamw")
_MUP = ("muadam", "muadamw", "musgd")
_KNOWN: Keys = {**PASSED, **SAID_TWICE}
_KINDS: Mapping[Kind, tuple[str, tuple[type, ...]]] = {
    "flag": ("true or false", (bool,)),
    "number": ("a number", (int, float)),
    "text": ("a word in quotation marks", (str,)),
    "list": ("a list", (list,)),
}
_CPU = ("cpu or none: nvme is not tested", "cpu", "none")
_ONE_OF: Mapping[str, tuple[str, ...]] = {
    "communication_data_type": ("fp32, bf16 or fp16", "fp32", "bf16", "fp16"),
    "checkpoint.tag_validation": ("Ignore, Warn or Fail", "ignore", "warn", "fail"),
    "data_types.grad_accum_dtype": ("fp32 or bf16", "fp32", "bf16"),
    "zero_optimization.offload_optimizer.device": _CPU,
    "zero_optimization.offload_param.device": _CPU,
}
"""Key, what was expected, the values."""


def read_ds_config(path: str) -> dict[str, Any]:
    """Return the content of DeepSpeed's JSON file.

    Raises:
        ConfigError: there is no such file, it is no JSON object, or a key is in it twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ConfigError(f"{path}: {twice}", "twice", "each key once in a block", "remove one of the two")
        return found

    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError(
            "--deepspeed-config", path, f"a file that can be read ({error.strerror})", "check the path"
        ) from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("--deepspeed-config", path, "DeepSpeed's JSON", f"correct it: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError("--deepspeed-config", path, "a JSON object", "write {...} around it")
    return content


def mistakes(path: str, args: Any) -> list[ConfigError]:
    """Return everything that is wrong with DeepSpeed's JSON file beside a command line.

    Keys that cannot be honoured, or are none; values that are not what the key wants, or something else than what the
    command line says.

    Args:
        path: the file.
        args: Megatron's namespace, validated or not yet: what is not known yet is not compared.
    """
    try:
        config = read_ds_config(path)
    except ConfigError as error:
        return [error]
    return [
        *_keys(path, config, _KNOWN),
        *_disagreements(path, config, args),
        *_stage(path, config, args),
        *_values(path, config, args),
        *_adam_errors(path, config),
    ]


def plan_engine(path: str, args: Any) -> EnginePlan:
    """Hold DeepSpeed's JSON file to Megatron's arguments and return what the engine is to be given.

    Args:
        path: the file.
        args: Megatron's namespace, validated.

    Raises:
        ConfigError: all `mistakes` at once, in a line each.
    """
    raise_together(mistakes(path, args))
    config = read_ds_config(path)
    zero = config.get("zero_optimization") or {}
    stage = int(zero.get("stage", 0))
    universal = _at(config, "checkpoint.load_universal") is True
    clip = float(args.clip_grad or 0.0)
    ours = {key: copy.deepcopy(value) for key, value in config.items() if key in PASSED}
    ours.update(
        train_micro_batch_size_per_gpu=args.micro_batch_size,
        # Megatron's schedule divides the loss by the number of micro batches and calls the engine's step once for all.
        gradient_accumulation_steps=1,
        managed_gradient_accumulation=False,
        # At stage 0 it would be clipped where the norm is not told: see `EngineOptimizer`.
        gradient_clipping=clip if stage else 0.0,
        bf16={**(config.get("bf16") or {}), "enabled": bool(args.bf16)},
        zero_optimization={**zero, "stage": stage},
        zero_allow_untested_optimizer=True,
    )
    return EnginePlan(path, ours, stage, _adam(config), clip, universal)


def _keys(path: str, block: Mapping[str, Any], known: Keys, above: str = "") -> Iterator[ConfigError]:
    """Yield what is wrong with the keys of a block and the kinds of their values."""
    for key, value in block.items():
        dotted = f"{above}{key}"
        kind = known.get(key)
        if dotted in REFUSED:
            if not _says_nothing(dotted, value):
                shown = value.get("type", "given") if isinstance(value, dict) else value
                yield ConfigError(f"{path}: {dotted}", shown, *REFUSED[dotted])
        elif kind is None:
            near = difflib.get_close_matches(key, known, n=1)
            yield ConfigError(
                f"{path}: {dotted}",
                "given",
                f"one of {', '.join(known)}" if len(known) < 8 else "a key that this package knows the consequences of",
                f"did you mean {near[0]}?" if near else "correct or remove it",
            )
        elif isinstance(kind, str):
            yield from _kind(path, dotted, value, kind)
        elif isinstance(value, dict):
            yield from _keys(path, value, kind, f"{dotted}.")
        elif value is not None:
            yield ConfigError(f"{path}: {dotted}", value, "a block {...}", "correct it")


def _says_nothing(dotted: str, value: Any) -> bool:
    """Return whether a refused key has a value with which nothing is asked for."""
    if isinstance(value, dict):
        return value.get("enabled") is False
    return value is None or value == HARMLESS.get(dotted, False)


def _kind(path: str, dotted: str, value: Any, kind: Kind) -> Iterator[ConfigError]:
    expected, types = _KINDS[kind]
    if value is None or value == AUTO:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number if kind == "number" else isinstance(value, types)):
        shown = json.dumps(value) if isinstance(value, str | bool) else value
        yield ConfigError(f"{path}: {dotted}", shown, expected, "correct it")
    elif number and dotted.startswith("zero_optimization.") and not value >= 0:
        yield ConfigError(f"{path}: {dotted}", value, "a number >= 0", "correct it")


def _disagreements(path: str, config: Mapping[str, Any], args: Any) -> Iterator[ConfigError]:
    for key, flag, of in _AGREE:
        given = _at(config, key)
        ours = of(args)
        # What is of the wrong kind, or "auto", is dealt with elsewhere.
        if given is not None and ours is not None and not isinstance(given, dict | str) and not _same(given, ours):
            fix = f"give both the same, or leave {key} out of the file"
            yield ConfigError(f"{path}: {key}", given, f"{ours}, as {flag} says", fix)
    managed = config.get("managed_gradient_accumulation")
    if managed not in (None, False):
        yield ConfigError(
            f"{path}: managed_gradient_accumulation",
            managed,
            "false: Megatron's schedule has divided the loss by the number of micro batches already",
            "remove it",
        )


def _stage(path: str, config: Mapping[str, Any], args: Any) -> Iterator[ConfigError]:
    """Yield what is wrong with the stage of ZeRO, or needs another one."""
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if isinstance(stage, bool) or not isinstance(stage, int | float):
        return  # no number, as `_keys` says
    if stage not in (0, 1, 2, 3):
        yield ConfigError(f"{path}: zero_optimization.stage", stage, "0, 1, 2 or 3", "correct it")
        return
    if stage == 0 and args.bf16:
        yield ConfigError(
            f"{path}: zero_optimization.stage",
            0,
            "1, 2 or 3 with --bf16: at 0 DeepSpeed decays the weights once before training, with an empty step",
            "give stage 1",
        )
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if _at(zero, f"{key}.device") == "cpu" and stage < least:
            yield ConfigError(
                f"{path}: zero_optimization.{key}", "cpu", f"ZeRO stage {least} or more", "raise the stage or remove it"
            )
    if zero.get("overlap_comm") is True and stage < 2:
        yield ConfigError(
            f"{path}: zero_optimization.overlap_comm",
            True,
            "false below stage 2, where gradients are reduced once, in the step",
            "remove it",
        )
    universal = _at(config, "checkpoint.load_universal") is True
    if universal and stage in (0, 3) and (stage == 0 or args.tensor_model_parallel_size > 1):
        yield ConfigError(
            f"{path}: checkpoint.load_universal",
            True,
            "ZeRO stage 1 or 2, or 3 without tensor parallelism: DeepSpeed 0.19 loads no other universal checkpoint",
            "give such a stage, or load the checkpoint at the number of ranks that saved it",
        )


def _values(path: str, config: Mapping[str, Any], args: Any) -> Iterator[ConfigError]:
    for key, (expected, *allowed) in _ONE_OF.items():
        value = _at(config, key)
        if isinstance(value, str) and value != AUTO and value.lower() not in allowed:
            yield ConfigError(f"{path}: {key}", value, expected, "correct it")
    sums = _at(config, "data_types.grad_accum_dtype")
    # Megatron's validation sets it with --bf16; before that, it is what was typed.
    typed = getattr(args, "accumulate_allreduce_grads_in_fp32", False) and not hasattr(args, "data_parallel_size")
    if typed and args.bf16 and sums != "fp32":
        yield ConfigError(
            f"{path}: data_types.grad_accum_dtype",
            sums,
            "fp32, as --accumulate-allreduce-grads-in-fp32 says",
            "give that in the file, or drop the flag",
        )
    if sums == "bf16" and not args.bf16:
        yield ConfigError(f"{path}: data_types.grad_accum_dtype", "bf16", "fp32 without --bf16", "correct it")


def _adam_errors(path: str, config: Mapping[str, Any]) -> Iterator[ConfigError]:
    block = config.get("optimizer")
    if not isinstance(block, dict):
        return
    kind, params = str(block.get("type", "")), block.get("params")
    if kind.lower() in _MUP:
        yield ConfigError(
            f"{path}: optimizer.type",
            kind,
            "Adam or AdamW: DeepSpeed's muP optimizers scale LR and weight decay by the shapes of package mup, beside"
            " the width rule",
            "give AdamW or remove the block; --width-scaling scales LR and weight decay",
        )
    elif kind.lower() not in _ADAMS:
        yield ConfigError(
            f"{path}: optimizer.type",
            kind or None,
            "Adam or AdamW: the width rules are derived for AdamW",
            "give AdamW or remove the block",
        )
    params = params if isinstance(params, dict) else {}
    for key in ("adam_w_mode", "bias_correction"):
        if params.get(key) is False:
            yield ConfigError(
                f"{path}: optimizer.params.{key}", False, "true: the width rules are derived for AdamW", "remove it"
            )
    if params.get("torch_adam") is True and _offloaded(config) and config.get("zero_force_ds_cpu_optimizer", True):
        yield ConfigError(
            f"{path}: optimizer.params.torch_adam",
            True,
            "zero_force_ds_cpu_optimizer false beside it, since the optimizer is offloaded",
            "add that, or remove torch_adam",
        )


def _adam(config: Mapping[str, Any]) -> Literal["torch", "fused", "cpu"]:
    """Return whose AdamW the file asks for: DeepSpeed's own choice, made by the same keys."""
    offloaded = _offloaded(config)
    if config.get("optimizer") is None:
        return "cpu" if offloaded and config.get("zero_force_ds_cpu_optimizer", True) else "torch"
    if _at(config, "optimizer.params.torch_adam") is True:
        return "torch"
    return "cpu" if offloaded else "fused"


def _offloaded(config: Mapping[str, Any]) -> bool:
    return bool(_at(config, "zero_optimization.offload_optimizer.device") == "cpu")


def _at(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key; None where it, or a block around it, is not given."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _same(given: Any, ours: Any) -> bool:
    if isinstance(given, list) and isinstance(ours, list):
        return len(given) == len(ours) and all(_same(a, b) for a, b in zip(given, ours, strict=True))
    if isinstance(given, bool) or isinstance(ours, bool) or not isinstance(given, (int, float)) or ours is None:
        return bool(given == ours)
    return math.isclose(given, ours, rel_tol=1e-12)
