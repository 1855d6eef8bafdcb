"""DeepSpeed's JSON file: what it may say, what must agree with Megatron's command line, what the engine is given.

Every key has one of four fates, and a key that is in none of the tables is refused, since DeepSpeed itself ignores it:

- `_AGREE`: Megatron's command line says it too, and both must say the same (``"auto"`` takes the command line's value);
- `_REFUSED`: it would change LR, weight decay or the parameters behind the width rule's back, or has no effect here;
- `_GIVEN`: set by this package, since Megatron's loop calls the engine;
- `_PASSED`: DeepSpeed gets it as it is.
"""

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_patch.errors import ConfigError

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
    ("train_batch_size", "--global-batch-size", lambda args: args.global_batch_size),
    ("train_micro_batch_size_per_gpu", "--micro-batch-size", lambda args: args.micro_batch_size),
    (
        "gradient_accumulation_steps",
        "--global-batch-size, --micro-batch-size and the data-parallel size",
        lambda args: args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
    ),
    ("gradient_clipping", "--clip-grad", lambda args: args.clip_grad),
    ("bf16.enabled", "--bf16", lambda args: bool(args.bf16)),
    ("fp16.enabled", "--fp16", lambda args: bool(args.fp16)),
    ("optimizer.params.lr", "--lr", lambda args: args.lr),
    ("optimizer.params.weight_decay", "--weight-decay", lambda args: args.weight_decay),
    ("optimizer.params.betas", "--adam-beta1 and --adam-beta2", lambda args: [args.adam_beta1, args.adam_beta2]),
    ("optimizer.params.eps", "--adam-eps", lambda args: args.adam_eps),
)
"""Key, the flag that says the same, and what that says."""

_ADAMS = ("adam", "adamw")
_MUP = ("muadam", "muadamw", "musgd")
_ADAM_PARAMS = ("lr", "weight_decay", "betas", "eps", "torch_adam", "adam_w_mode", "bias_correction")

_NO_EFFECT = "Megatron's loop does not use it"
_REFUSED: dict[str, tuple[str, str]] = {
    "scheduler": (
        "no scheduler: DeepSpeed's (WarmupLR, WarmupDecayLR, OneCycle, ...) would write LRs of its own into the param"
        " groups, where the width rule's are",
        "remove the block; --lr, --lr-warmup-iters, --lr-decay-style and their neighbours make the schedule",
    ),
    "torch_autocast": ("no torch_autocast: Megatron's --bf16 decides the precision", "remove the block"),
    "amp": ("no amp: Megatron's --bf16 decides the precision", "remove the block"),
    "bfloat16": ("the key bf16, its present name", "rename it"),
    "gradient_allreduce_op": ("no such key: gradients are averaged over the ranks, as Megatron's are", "remove it"),
    "tensor_parallel": ("no tensor_parallel: Megatron has split the model", "give --tensor-model-parallel-size"),
    "sequence_parallel_size": ("no Ulysses: it takes ranks out of Megatron's groups", "give --sequence-parallel"),
    "data_parallel_size": ("no such key: Megatron makes the groups of ranks", "remove it"),
    "expert_parallel": ("no expert_parallel: experts are not supported with --deepspeed", "remove the block"),
    "pipeline": ("no pipeline: Megatron's loop calls the engine once per micro batch", "remove the block"),
    "hybrid_engine": (f"no hybrid_engine: {_NO_EFFECT}", "remove the block"),
    "data_efficiency": (f"no data_efficiency: {_NO_EFFECT}", "remove the block"),
    "curriculum_learning": (f"no curriculum_learning: {_NO_EFFECT}", "remove the block"),
    "activation_checkpointing": (
        f"no activation_checkpointing: {_NO_EFFECT}",
        "remove the block; --recompute-granularity does it",
    ),
    "compile": ("no DeepCompile: it does not go with a backward pass that Megatron calls", "remove the block"),
    "autotuning": ("no autotuning: it starts runs of its own", "remove the block"),
    "elasticity": ("no elasticity: DeepSpeed 0.19 has removed it", "remove the block"),
    "compression_training": ("no compression: it changes the parameters", "remove the block"),
    "weight_quantization": ("no weight_quantization: it changes the parameters", "remove the block"),
    "progressive_layer_drop": ("no progressive_layer_drop: it changes the model", "remove the block"),
    "sparse_gradients": ("no sparse_gradients: DeepSpeed 0.19 has removed it", "remove it"),
}
"""Key, what was expected, what to do."""

_GIVEN = ("managed_gradient_accumulation", "zero_allow_untested_optimizer")
_PASSED = (
    "zero_optimization",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "disable_allgather",
    "data_types",
    "aio",
    "checkpoint",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "python_gc",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "wandb",
    "csv_monitor",
)
_BLOCKS = {"optimizer": ("type", "params"), "fp16": ("enabled",)}
"""Blocks of which only these keys are known here."""

_ZERO_PLUS_PLUS = ("no ZeRO++: it is not tested with the audit and the metrics", "remove it")
_ZERO_REFUSED: dict[str, tuple[str, str]] = {
    "zenflow": ("no ZenFlow: it updates parameters out of step with the scheduler", "remove the block"),
    "zero_hpz_partition_size": _ZERO_PLUS_PLUS,
    "zero_quantized_weights": _ZERO_PLUS_PLUS,
    "zero_quantized_nontrainable_weights": _ZERO_PLUS_PLUS,
    "zero_quantized_gradients": _ZERO_PLUS_PLUS,
    "cpu_offload": ('"offload_optimizer": {"device": "cpu"}, its present form', "write that"),
    "cpu_offload_params": ('"offload_param": {"device": "cpu"}, its present form', "write that"),
    "round_robin_gradients": (
        "false: DeepSpeed 0.19 then takes other fp32 weights for a parameter's own, in universal checkpoints too",
        "remove it",
    ),
    "elastic_checkpoint": (
        "no elastic_checkpoint: DeepSpeed 0.19 refuses another number of ranks with it too",
        "remove it; docs/deepspeed.md has the way by a universal checkpoint",
    ),
}


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


def plan_engine(path: str, args: Any) -> EnginePlan:
    """Hold DeepSpeed's JSON file to Megatron's arguments and return what the engine is to be given.

    Args:
        path: the file.
        args: Megatron's namespace, validated.

    Raises:
        ConfigError: in one line: a key that cannot be honoured, or one that says something else than the command line.
    """
    config = read_ds_config(path)
    _refuse_keys(path, config)
    for key, flag, of in _AGREE:
        given = _at(path, config, key)
        if given is not None and given != AUTO and not _same(given, of(args)):
            fix = f"give both the same, or leave {key} out of the file"
            raise ConfigError(f"{path}: {key}", given, f"{of(args)}, as {flag} says", fix)
    for key in ("zero_optimization.stage", "data_types.grad_accum_dtype", "checkpoint.load_universal"):
        _at(path, config, key)  # what is above it must be a block
    zero = dict(config.get("zero_optimization") or {})
    stage = _check_zero(path, zero, config, args)
    adam = _adam(path, config, stage, zero)
    clip = float(args.clip_grad or 0.0)
    ours = {key: copy.deepcopy(value) for key, value in config.items() if key in _PASSED}
    ours.update(
        train_micro_batch_size_per_gpu=args.micro_batch_size,
        # Megatron's schedule divides the loss by the number of micro batches and calls the engine's step once for all.
        gradient_accumulation_steps=1,
        managed_gradient_accumulation=False,
        # At stage 0 it would be clipped where the norm is not told: see `EngineOptimizer`.
        gradient_clipping=clip if stage else 0.0,
        bf16={**config.get("bf16", {}), "enabled": bool(args.bf16)},
        zero_optimization={**zero, "stage": stage},
        zero_allow_untested_optimizer=True,
    )
    universal = bool((config.get("checkpoint") or {}).get("load_universal", False))
    if universal and stage in (0, 3) and (stage == 0 or args.tensor_model_parallel_size > 1):
        raise ConfigError(
            f"{path}: checkpoint.load_universal",
            True,
            "ZeRO stage 1 or 2, or 3 without tensor parallelism: DeepSpeed 0.19 loads no other universal checkpoint",
            "give such a stage, or load the checkpoint at the number of ranks that saved it",
        )
    return EnginePlan(path, ours, stage, adam, clip, universal)


def _refuse_keys(path: str, config: Mapping[str, Any]) -> None:
    known = {key.partition(".")[0] for key, _, _ in _AGREE} | {*_GIVEN, *_PASSED}
    for key, value in config.items():
        if key in _REFUSED:
            shown = value.get("type", "given") if isinstance(value, dict) else value
            raise ConfigError(f"{path}: {key}", shown, *_REFUSED[key])
        if key not in known:
            raise ConfigError(
                f"{path}: {key}", "given", "a key that this package knows the consequences of", "correct or remove it"
            )
        for inner in value if isinstance(value, dict) and key in _BLOCKS else ():
            if inner not in _BLOCKS[key]:
                raise ConfigError(f"{path}: {key}.{inner}", "given", f"{' and '.join(_BLOCKS[key])} alone", "remove it")
    if config.get("managed_gradient_accumulation", False) is not False:
        raise ConfigError(
            f"{path}: managed_gradient_accumulation",
            config["managed_gradient_accumulation"],
            "false: Megatron's schedule has divided the loss by the number of micro batches already",
            "remove it",
        )


def _at(path: str, config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key; None where it is not given."""
    value: Any = config
    above = ""
    for part in key.split("."):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: {above}", value, "a block {...}", "correct it")
        value = value.get(part)
        above = f"{above}.{part}".lstrip(".")
    return value


def _same(given: Any, ours: Any) -> bool:
    if isinstance(given, list) and isinstance(ours, list):
        return len(given) == len(ours) and all(_same(a, b) for a, b in zip(given, ours, strict=True))
    if isinstance(given, bool) or isinstance(ours, bool) or not isinstance(given, (int, float)) or ours is None:
        return bool(given == ours)
    return math.isclose(given, ours, rel_tol=1e-12)


def _check_zero(path: str, zero: Mapping[str, Any], config: Mapping[str, Any], args: Any) -> int:
    """Return the stage."""
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage", stage, "0, 1, 2 or 3", "correct it")
    for key, value in zero.items():
        off = value is None or value is False or (key == "zero_hpz_partition_size" and value == 1)
        if key in _ZERO_REFUSED and not off:
            raise ConfigError(
                f"{path}: zero_optimization.{key}", "given" if isinstance(value, dict) else value, *_ZERO_REFUSED[key]
            )
    if stage == 0 and args.bf16:
        raise ConfigError(
            f"{path}: zero_optimization.stage",
            0,
            "1, 2 or 3 with --bf16: at 0 DeepSpeed decays the weights once before training, with an empty step",
            "give stage 1",
        )
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = _at(path, config, f"zero_optimization.{key}.device") or "none"
        if device not in ("none", "cpu"):
            raise ConfigError(
                f"{path}: zero_optimization.{key}.device", device, "cpu or none: nvme is not tested", "give cpu"
            )
        if device == "cpu" and stage < least:
            raise ConfigError(
                f"{path}: zero_optimization.{key}", "cpu", f"ZeRO stage {least} or more", "raise the stage or remove it"
            )
    if zero.get("overlap_comm") and stage < 2:
        raise ConfigError(
            f"{path}: zero_optimization.overlap_comm",
            True,
            "false below stage 2, where gradients are reduced once, in the step",
            "remove it",
        )
    return int(stage)


def _adam(
    path: str, config: Mapping[str, Any], stage: int, zero: Mapping[str, Any]
) -> Literal["torch", "fused", "cpu"]:
    """Return whose AdamW the file asks for: DeepSpeed's own choice, made by the same keys."""
    block = config.get("optimizer")
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") == "cpu"
    if block is None:
        return "cpu" if offloaded and config.get("zero_force_ds_cpu_optimizer", True) else "torch"
    kind, params = str(block.get("type", "")), block.get("params") or {}
    if kind.lower() in _MUP:
        raise ConfigError(
            f"{path}: optimizer.type",
            kind,
            "Adam or AdamW: DeepSpeed's muP optimizers scale LR and weight decay by the shapes of package mup, beside"
            " the width rule",
            "give AdamW or remove the block; --width-scaling scales LR and weight decay",
        )
    if kind.lower() not in _ADAMS:
        raise ConfigError(
            f"{path}: optimizer.type",
            kind or None,
            "Adam or AdamW: the width rules are derived for AdamW",
            "give AdamW or remove the block",
        )
    for key, value in params.items():
        if key not in _ADAM_PARAMS:
            raise ConfigError(
                f"{path}: optimizer.params.{key}", value, f"one of {', '.join(_ADAM_PARAMS)}", "remove it"
            )
        if key in ("adam_w_mode", "bias_correction") and value is not True:
            raise ConfigError(
                f"{path}: optimizer.params.{key}", value, "true: the width rules are derived for AdamW", "remove it"
            )
    if params.get("torch_adam", False):
        if offloaded and config.get("zero_force_ds_cpu_optimizer", True):
            raise ConfigError(
                f"{path}: optimizer.params.torch_adam",
                True,
                "zero_force_ds_cpu_optimizer false beside it, since the optimizer is offloaded",
                "add that, or remove torch_adam",
            )
        return "torch"
    return "cpu" if offloaded else "fused"
