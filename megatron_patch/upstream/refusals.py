"""What our flags cannot be honoured with: one table, a row for each thing that is refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from megatron_patch.config.optimizer import EMERGING, SHARD_BY_SHARD
from megatron_patch.errors import ConfigError


class Feature(Enum):
    """What was asked for of this package."""

    ANY = auto()
    """Whatever changes or measures a run: width scaling, an extra warmup, metrics."""
    METRICS = auto()
    RULE = auto()
    """A rule for LR and weight decay across width."""
    ENGINE = auto()
    """DeepSpeed's engine."""
    CPU = auto()


_ITSELF = object()


@dataclass(frozen=True)
class Refusal:
    """A setting of Megatron's, and the feature it is refused with."""

    attribute: str
    """Its name in Megatron's namespace; with `Feature.CPU`, which is checked before there is one, the flag."""
    flag: str
    fine: tuple[Any, ...]
    """Values that are not refused; to be absent is fine as well."""
    feature: Feature
    expected: str
    fix: str
    got: Any = _ITSELF
    """What the error shows; by default the value."""
    applies: Callable[[Mapping[str, Any]], bool] = lambda settings: True
    """Whether the other settings make it matter at all."""


def refused(feature: Feature, settings: Mapping[str, Any]) -> list[ConfigError]:
    """Return what a feature that was asked for cannot be honoured with.

    Args:
        feature: what was asked for.
        settings: Megatron's, by attribute name; with `Feature.CPU` the flags as typed, with their values.
    """
    return [
        ConfigError(row.flag, settings[row.attribute] if row.got is _ITSELF else row.got, row.expected, row.fix)
        for row in TABLE
        if row.feature is feature
        and row.attribute in settings
        and row.applies(settings)
        and settings[row.attribute] not in row.fine
    ]


_OFF = (None, False)


def _splits_matrices(settings: Mapping[str, Any]) -> bool:
    return max(settings.get(name) or 1 for name in ("tensor_model_parallel_size", "expert_tensor_parallel_size")) > 1


_DROP_METRICS = "drop it, or set --alignment-interval and --spectral-interval to 0"


def _second_path(attribute: str, flag: str, reason: str) -> Refusal:
    """A path to the parameters beside the param groups that this package audits."""
    expected = f"not together with the width-transfer flags: {reason}"
    return Refusal(attribute, flag, _OFF, Feature.ANY, expected, "drop one of the two", got="given")


def _second_shards(attribute: str, flag: str) -> Refusal:
    expected = "1 with the width-transfer flags: weights sharded a second time have no known fan-in"
    fix = "set it to 1 or drop the width-transfer flags"
    return Refusal(attribute, flag, (None, 0, 1), Feature.ANY, expected, fix)


def _inexact(attribute: str, flag: str, fine: tuple[Any, ...], expected: str) -> Refusal:
    """What the metrics cannot be exact with."""
    return Refusal(attribute, flag, fine, Feature.METRICS, f"{expected}, while metrics are on", _DROP_METRICS)


def _not_with_flex(attribute: str, fine: tuple[Any, ...]) -> Refusal:
    """What drops a token on its way to an expert, or makes another of it than the router saw."""
    return Refusal(
        attribute,
        f"--{attribute.replace('_', '-')}",
        fine,
        Feature.METRICS,
        "no such flag with --moe-token-dispatcher-type flex while metrics are on: experts' tokens are found by their "
        "bits, and it changes or drops them",
        f"let --moe-token-dispatcher-type be alltoall, {_DROP_METRICS.partition(', ')[2]}",
        applies=lambda settings: str(settings.get("moe_token_dispatcher_type")) == "flex",
    )


def _not_with_engine(
    attribute: str, expected: str, fine: tuple[Any, ...] = _OFF, fix: str = "drop it", flag: str | None = None
) -> Refusal:
    """What the engine would not do, or would ignore."""
    flag = flag or f"--{attribute.replace('_', '-')}"
    return Refusal(attribute, flag, fine, Feature.ENGINE, f"with --deepspeed {expected}", f"{fix}, or drop --deepspeed")


def _needs_gpu(flag: str, reason: str, harmless: str | None = None) -> Refusal:
    """What only a GPU has; `harmless` is the one value that does not ask for it."""
    expected = f"{harmless or 'no such flag'} with --cpu ({reason})"
    return Refusal(flag, flag, (harmless,) if harmless else (), Feature.CPU, expected, CPU_FIX)


CPU_FIX = "drop the flag, or drop --cpu and run on a GPU"
_SHARDS = "no FSDP, whose shards are not measured"
_NO_DDP = "no such flag: it is for Megatron's DDP, which does not train"
_NO_HOOKS = "a replayed graph calls no hooks"

TABLE: tuple[Refusal, ...] = (
    Refusal(
        "optimizer",
        "--optimizer",
        ("adam", "dist_muon", *EMERGING),
        Feature.ANY,
        f"adam, {', '.join(EMERGING[:-1])} or {EMERGING[-1]} with width scaling, extra warmups or metrics: how others"
        " scale their updates is not known",
        "use one of these or drop the width-transfer flags",
    ),
    Refusal(
        "muon_tp_mode",
        "--muon-tp-mode",
        ("duplicated", "distributed"),
        Feature.RULE,
        "duplicated or distributed with a width rule and tensor parallelism: blockwise, Megatron's default, scales the"
        " update by the shape of a shard, so that it would depend on how the weights are split",
        "add --muon-tp-mode duplicated",
        applies=lambda settings: str(settings.get("optimizer")).endswith("muon") and _splits_matrices(settings),
    ),
    Refusal(
        "optimizer",
        "--optimizer",
        ("adam", *(name for name in EMERGING if name not in SHARD_BY_SHARD), "muon", "dist_muon"),
        Feature.RULE,
        "no tensor parallelism with a width rule: it preconditions each shard by itself, so that its update depends on"
        " how the weights are split",
        "set --tensor-model-parallel-size 1, or use --optimizer muon --muon-tp-mode duplicated",
        applies=lambda settings: _splits_matrices(settings),
    ),
    Refusal(
        "use_layer_wise_distributed_optimizer",
        "--use-distributed-optimizer",
        _OFF,
        Feature.ANY,
        "--bf16 beside it with this optimizer: in fp32 Megatron 0.19's layer-wise distributed optimizer fails at the"
        " first step (its parts have no get_loss_scale)",
        "add --bf16, or drop the flag",
        got="in fp32",
        applies=lambda settings: not settings.get("bf16"),
    ),
    Refusal(
        "decoupled_weight_decay",
        "decoupled_weight_decay",  # an attribute that a script may set; there is no flag
        (True,),
        Feature.ANY,
        "True (AdamW): with L2 the product of LR and weight decay has no meaning",
        "do not set it in the script",
    ),
    Refusal(
        "weight_decay_incr_style",
        "--weight-decay-incr-style",
        (None, "constant"),
        Feature.ANY,
        "constant with --optimizer-cuda-graph: a captured step keeps the weight decay that it was captured with",
        "drop one of the two",
        applies=lambda settings: bool(settings.get("optimizer_cuda_graph")),
    ),
    _second_path("optimizer_cpu_offload", "--optimizer-cpu-offload", "it keeps a second set of param groups"),
    _second_shards("gtp_weight_remat_size", "--tensor-parallel-num-weight-shards"),
    _second_shards("expert_gtp_weight_remat_size", "--expert-tensor-parallel-num-weight-shards"),
    Refusal(
        "main_params_dtype",
        "--main-params-dtype",
        (None, "fp32"),
        Feature.METRICS,
        "fp32 while metrics are on: from coarser weights no update can be measured",
        "leave it out, or set --alignment-interval and --spectral-interval to 0",
        # Once Megatron has read it, the value is torch's; torch itself is not imported for a look at flags.
        applies=lambda settings: (
            bool(settings.get("use_precision_aware_optimizer"))
            and str(settings["main_params_dtype"]) != "torch.float32"
        ),
    ),
    _inexact("use_megatron_fsdp", "--use-megatron-fsdp", _OFF, _SHARDS),
    _inexact("use_torch_fsdp2", "--use-torch-fsdp2", _OFF, _SHARDS),
    _inexact("cuda_graph_impl", "--cuda-graph-impl", (None, "none"), f"none: {_NO_HOOKS}"),
    _inexact("enable_cuda_graph", "--enable-cuda-graph", _OFF, f"no CUDA graphs: {_NO_HOOKS}"),
    _inexact("external_cuda_graph", "--external-cuda-graph", _OFF, f"no CUDA graphs: {_NO_HOOKS}"),
    _inexact("optimizer_cuda_graph", "--optimizer-cuda-graph", _OFF, "an optimizer step that Python sees"),
    _inexact("use_transformer_engine_op_fuser", "--use-transformer-engine-op-fuser", _OFF, "linear layers as modules"),
    Refusal(
        "moe_shared_expert_overlap",
        "--moe-shared-expert-overlap",
        _OFF,
        Feature.METRICS,
        "no --moe-shared-expert-gate beside it while metrics are on: overlapped, the gate is part of no module's call",
        f"drop one of the two, {_DROP_METRICS.partition(', ')[2]}",
        applies=lambda settings: bool(settings.get("moe_shared_expert_gate")),
    ),
    _inexact(
        "overlap_moe_expert_parallel_comm", "--overlap-moe-expert-parallel-comm", _OFF, "one microbatch at a time"
    ),
    _inexact("moe_single_grouped_weight", "--moe-single-grouped-weight", _OFF, "one weight per expert"),
    _not_with_flex("moe_latent_size", (None,)),
    _not_with_flex("moe_expert_rank_capacity_factor", (None,)),
    _not_with_flex("moe_apply_probs_on_input", _OFF),
    Refusal(
        "sequence_parallel",
        "--sequence-parallel",
        (True,),
        Feature.METRICS,
        "the flag, with experts and tensor parallelism",
        "add it",
        got=None,
        applies=lambda settings: bool(settings.get("num_experts")) and settings["tensor_model_parallel_size"] > 1,
    ),
    # Layouts and precision
    _not_with_engine(
        "pipeline_model_parallel_size", "1: the engine has no stages of Megatron's pipeline", (None, 1), "set it to 1"
    ),
    _not_with_engine("context_parallel_size", "1: not tested (it needs a GPU)", (None, 1), "set it to 1"),
    _not_with_engine("num_experts", "no experts: they have data-parallel groups of their own", (None, 0)),
    _not_with_engine("fp16", "--bf16 or fp32: loss scaling by the engine is not tested", fix="give --bf16"),
    _not_with_engine("fp8_param_gather", "no such flag: the engine gathers parameters itself"),
    _not_with_engine("fp4_param_gather", "no such flag: the engine gathers parameters itself"),
    _not_with_engine("cuda_graph_impl", "none: ZeRO runs Python in both passes", (None, "none")),
    _not_with_engine("optimizer_cuda_graph", "no such flag: ZeRO's step runs Python"),
    _not_with_engine("init_model_with_meta_device", "weights that are there when it is built"),
    _not_with_engine("data_parallel_random_init", "the same weights on all ranks when it is built"),
    # Gradients and the optimizer
    _not_with_engine("use_megatron_fsdp", "no such flag: ZeRO shards the weights"),
    _not_with_engine("use_torch_fsdp2", "no such flag: ZeRO shards the weights"),
    _not_with_engine("use_distributed_optimizer", "no such flag: ZeRO shards the optimizer"),
    _not_with_engine("use_layer_wise_distributed_optimizer", "no such flag: ZeRO shards the optimizer"),
    _not_with_engine("use_precision_aware_optimizer", "no such flag: the engine keeps the fp32 weights"),
    _not_with_engine("optimizer", "adam: the engine builds its own", ("adam",), "use adam"),
    _not_with_engine(
        "overlap_grad_reduce", "no such flag: zero_optimization.overlap_comm in the JSON file is the engine's"
    ),
    _not_with_engine("overlap_param_gather", "no such flag: the engine gathers parameters itself"),
    _not_with_engine(
        "gradient_accumulation_fusion",
        "the flag: the fused kernel writes gradients where the engine does not look",
        fix="add it",
        flag="--no-gradient-accumulation-fusion",
    ),
    _not_with_engine("delay_wgrad_compute", "no such flag: gradients that come later are not reduced"),
    _not_with_engine(
        "calculate_per_token_loss",
        "a loss per sequence: gradients cannot be scaled once the engine has reduced them",
    ),
    _not_with_engine("grad_reduce_in_bf16", "no such flag: communication_data_type in the JSON file is the engine's"),
    _not_with_engine("ddp_bucket_size", "no such flag: zero_optimization.reduce_bucket_size is the engine's", (None,)),
    _not_with_engine("ddp_num_buckets", "no such flag: zero_optimization.reduce_bucket_size is the engine's", (None,)),
    _not_with_engine("ddp_average_in_collective", _NO_DDP),
    _not_with_engine("ddp_pad_buckets_for_high_nccl_busbw", _NO_DDP),
    _not_with_engine("ddp_reduce_scatter_with_fp32_accumulation", _NO_DDP),
    _not_with_engine("ddp_param_name_patterns_for_fp32_local_accumulation", _NO_DDP, (None, [], ())),
    _not_with_engine("check_for_large_grads", "no such flag: the engine keeps the gradients to itself"),
    _not_with_engine("qk_clip", "no such flag: it writes to weights that the engine keeps in fp32"),
    _not_with_engine("freeze_all_layers", "something to train"),
    _not_with_engine("perform_rl_step", "pretraining alone"),
    _not_with_engine("inprocess_restart", "new processes: the engine cannot be taken down", fix="use --restarts"),
    # Checkpoints
    _not_with_engine("async_save", "no such flag: the engine saves while the run waits"),
    _not_with_engine("ckpt_format", "torch_dist, beside the engine's own files", (None, "torch_dist")),
    _not_with_engine("ckpt_convert_format", "no conversion", (None,)),
    _not_with_engine("non_persistent_save_interval", "checkpoints of one kind", (None,)),
    _not_with_engine("non_persistent_ckpt_type", "checkpoints of one kind", (None,)),
    _not_with_engine("pretrained_checkpoint", "--load", (None,)),
    _not_with_engine("no_save_optim", "whole checkpoints: the engine saves its optimizer with the weights"),
    _not_with_engine("load_main_params_from_ckpt", "no such flag: the engine's checkpoints hold the fp32 weights"),
    _not_with_engine("override_ckpt_iteration", "the iteration that the engine's files are named by", (None,)),
    _not_with_engine(
        "dist_ckpt_optim_fully_reshardable",
        "no such flag: universal checkpoints go to other numbers of ranks (docs/deepspeed.md)",
    ),
    _not_with_engine("replication", "checkpoints of one kind"),
    _not_with_engine("verify_integrity", "no such flag: the engine's files have no hashes"),
    _not_with_engine(
        "override_width_scaling",
        "the checkpoint's hyperparameters: the engine keeps its state by place in the param groups",
    ),
    _not_with_engine("skip_train", "training: the engine's checkpoints are loaded with its optimizer"),
    # What looks at parameters or gradients
    _not_with_engine("log_params_norm", "no such flag: at stage 3 no rank holds the parameters"),
    _not_with_engine("log_num_zeros_in_grad", "no such flag: the engine keeps the gradients to itself"),
    _not_with_engine(
        "check_weight_hash_across_dp_replicas_interval",
        "no such flag: at stage 3 no rank holds the parameters",
        (None,),
    ),
    _not_with_engine(
        "dump_param_to_param_group_map",
        "no such flag: `explain` and hyperparameters.json say which parameter is in which group",
        (None,),
    ),
    _not_with_engine("save_wgrads_interval", "no dumps of gradients", (None,)),
    _not_with_engine("save_dgrads_interval", "no dumps of gradients", (None,)),
    _not_with_engine("save_activations_interval", "no dumps of activations", (None,)),
    _not_with_engine("save_params_interval", "no dumps of parameters", (None,)),
    _needs_gpu("--fp8-format", "fp8 needs Transformer Engine"),
    _needs_gpu("--fp4-format", "fp4 needs Transformer Engine"),
    _needs_gpu("--multi-latent-attention", "the local spec's attention does not take the head sizes of MLA"),
    Refusal(
        "--hybrid-layer-pattern",
        "--hybrid-layer-pattern",
        (),
        Feature.CPU,
        "the layers M, *, - and E with --cpu (MLA, gated delta nets and sparse attention, + G D, need a GPU)",
        "choose among these, or drop --cpu and run on a GPU",
        applies=lambda flags: not set(flags["--hybrid-layer-pattern"]).isdisjoint("+GD"),
    ),
    _needs_gpu("--use-flash-attn", "flash attention is a CUDA kernel"),
    _needs_gpu("--moe-grouped-gemm", "grouped GEMM needs Transformer Engine"),
    _needs_gpu("--moe-permute-fusion", "the fused permutation needs Transformer Engine"),
    _needs_gpu("--moe-router-fusion", "the fused router needs Transformer Engine"),
    _needs_gpu("--cross-entropy-fusion-impl", "the te implementation needs Transformer Engine", "native"),
    _needs_gpu("--use-precision-aware-optimizer", "it needs Transformer Engine's FusedAdam"),
    _needs_gpu("--te-rng-tracker", "it needs Transformer Engine"),
    _needs_gpu("--tp-comm-overlap", "it needs Transformer Engine"),
    _needs_gpu("--enable-cuda-graph", "there are no CUDA graphs"),
    _needs_gpu("--external-cuda-graph", "there are no CUDA graphs"),
    _needs_gpu("--cuda-graph-impl", "there are no CUDA graphs", "none"),
    _needs_gpu("--optimizer-cuda-graph", "there are no CUDA graphs"),
    _needs_gpu("--use-nccl-ub", "NCCL needs GPUs"),
    _needs_gpu("--nccl-communicator-config-path", "NCCL needs GPUs"),
    _needs_gpu("--use-megatron-fsdp", "its device mesh is one of GPUs"),
    _needs_gpu("--use-torch-fsdp2", "its device mesh is one of GPUs"),
    _needs_gpu("--fine-grained-activation-offloading", "it moves tensors between GPU and host"),
    _needs_gpu("--record-memory-history", "it records the CUDA allocator"),
)
