"""What the width-transfer flags cannot be honoured with."""

from typing import Any

from megatron_patch.errors import ConfigError

_REFUSED: tuple[tuple[str, str, tuple[Any, ...], str], ...] = (
    # attribute of args, flag, values that are fine, what is expected
    ("cuda_graph_impl", "--cuda-graph-impl", (None, "none"), "none: a replayed graph calls no hooks"),
    ("enable_cuda_graph", "--enable-cuda-graph", (None, False), "no CUDA graphs: a replayed graph calls no hooks"),
    ("external_cuda_graph", "--external-cuda-graph", (None, False), "no CUDA graphs: a replayed graph calls no hooks"),
    ("optimizer_cuda_graph", "--optimizer-cuda-graph", (None, False), "an optimizer step that Python sees"),
    ("use_transformer_engine_op_fuser", "--use-transformer-engine-op-fuser", (None, False), "linear layers as modules"),
    ("use_megatron_fsdp", "--use-megatron-fsdp", (None, False), "DDP with or without the distributed optimizer"),
    ("use_torch_fsdp2", "--use-torch-fsdp2", (None, False), "DDP with or without the distributed optimizer"),
    ("gtp_weight_remat_size", "--tensor-parallel-num-weight-shards", (None, 1), "1"),
    ("expert_gtp_weight_remat_size", "--expert-tensor-parallel-num-weight-shards", (None, 1), "1"),
    ("optimizer_cpu_offload", "--optimizer-cpu-offload", (None, False), "fp32 weights on the device"),
    (
        "num_distributed_optimizer_instances",
        "--num-distributed-optimizer-instances",
        (None, 1),
        "1: several instances are not tested",
    ),
    ("mtp_num_layers", "--mtp-num-layers", (None, 0), "no multi-token prediction: it calls the LM head several times"),
    ("moe_shared_expert_overlap", "--moe-shared-expert-overlap", (None, False), "shared experts on the main stream"),
    (
        "overlap_moe_expert_parallel_comm",
        "--overlap-moe-expert-parallel-comm",
        (None, False),
        "one microbatch at a time",
    ),
    ("moe_single_grouped_weight", "--moe-single-grouped-weight", (None, False), "one weight per expert"),
    (
        "moe_pad_expert_input_to_capacity",
        "--moe-pad-expert-input-to-capacity",
        (None, False),
        "experts without padding between their tokens",
    ),
    (
        "moe_router_padding_for_quantization",
        "--moe-router-padding-for-quantization",
        (None, False),
        "experts that get only the tokens routed to them",
    ),
)


def check_supported(args: Any) -> None:
    """Refuse what the metrics cannot be exact with.

    Args:
        args: Megatron's, validated.

    Raises:
        ConfigError: names the flag.
    """
    fix = "drop it, or set --alignment-interval and --spectral-interval to 0"
    for attribute, flag, fine, expected in _REFUSED:
        value = getattr(args, attribute, None)
        if value not in fine:
            raise ConfigError(flag, value, f"{expected}, while metrics are on", fix)
    if args.num_experts:
        if args.moe_token_dispatcher_type not in ("alltoall", "allgather"):
            raise ConfigError(
                "--moe-token-dispatcher-type",
                args.moe_token_dispatcher_type,
                "alltoall or allgather while metrics are on: the order of an expert's tokens must be known",
                fix,
            )
        if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
            raise ConfigError("--sequence-parallel", None, "the flag, with experts and tensor parallelism", "add it")


def _check_optimizer(args: Any) -> None:
    """Refuse what takes another path to the parameters than the param groups this package audits."""
    if args.optimizer != "adam":
        raise ConfigError(
            "--optimizer",
            args.optimizer,
            "adam with width scaling, extra warmups or metrics: the rules are derived for AdamW"
            " and Muon-like optimizers carry width factors of their own",
            "use --optimizer adam or drop the width-transfer flags",
        )
    if not getattr(args, "decoupled_weight_decay", True):
        raise ConfigError(
            "decoupled_weight_decay",
            False,
            "True (AdamW): with L2 the product of LR and weight decay has no meaning",
            "do not set it in the script",
        )
    for name, spelling, reason in (
        (
            "use_megatron_fsdp",
            "--use-megatron-fsdp",
            "it rebuilds the parameters and drops the attributes the rules read",
        ),
        ("use_torch_fsdp2", "--use-torch-fsdp2", "it rebuilds the parameters and drops the attributes the rules read"),
        ("optimizer_cpu_offload", "--optimizer-cpu-offload", "it keeps a second set of param groups"),
    ):
        if getattr(args, name, False):
            raise ConfigError(
                spelling, "given", f"not together with the width-transfer flags: {reason}", "drop one of the two"
            )
    for name, spelling in (
        ("gtp_weight_remat_size", "--tensor-parallel-num-weight-shards"),
        ("expert_gtp_weight_remat_size", "--expert-tensor-parallel-num-weight-shards"),
    ):
        if (getattr(args, name, 1) or 1) > 1:
            raise ConfigError(
                spelling,
                getattr(args, name),
                "1 with the width-transfer flags: weights sharded a second time have no known fan-in",
                "set it to 1 or drop the width-transfer flags",
            )
