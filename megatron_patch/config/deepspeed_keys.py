"""The keys of DeepSpeed's JSON file (0.19.8): which are passed on, and which are refused for what reason.

A key that is in no table here is refused: of some that it does not know DeepSpeed says nothing, over others it fails
when the model has been built. `tests/test_deepspeed_file.py` holds the tables to DeepSpeed's own.
"""

from collections.abc import Mapping
from typing import Literal

type Kind = Literal["flag", "number", "text", "list"]
type Keys = Mapping[str, Kind | Keys]
"""The keys of a block: what kind of value each has, or its own keys."""

_MONITOR: Keys = {"enabled": "flag", "output_path": "text", "job_name": "text"}
_STAGE_3: Keys = {
    "prefetch_bucket_size": "number",
    "param_persistence_threshold": "number",
    "model_persistence_threshold": "number",
    "max_live_parameters": "number",
    "max_reuse_distance": "number",
    "gather_16bit_weights_on_model_save": "flag",
    "module_granularity_threshold": "number",
    "use_all_reduce_for_fetch_params": "flag",
    "allgather_sequential": "flag",
}

PASSED: Keys = {
    "zero_optimization": {
        "stage": "number",
        "contiguous_gradients": "flag",
        "reduce_scatter": "flag",
        "reduce_bucket_size": "number",
        "use_multi_rank_bucket_allreduce": "flag",
        "allgather_partitions": "flag",
        "allgather_bucket_size": "number",
        "overlap_comm": "flag",
        "sub_group_size": "number",
        "ignore_unused_parameters": "flag",
        "memory_efficient_linear": "flag",
        "override_module_apply": "flag",
        "log_trace_cache_warnings": "flag",
        "enable_sanity_checks": "flag",
        "offload_optimizer": {
            "device": "text",
            "buffer_count": "number",
            "pin_memory": "flag",
            "fast_init": "flag",
        },
        "offload_param": {
            "device": "text",
            "buffer_count": "number",
            "buffer_size": "number",
            "max_in_cpu": "number",
            "pin_memory": "flag",
        },
        **_STAGE_3,
        **{f"stage3_{key}": kind for key, kind in _STAGE_3.items()},
    },
    "zero_force_ds_cpu_optimizer": "flag",
    "communication_data_type": "text",
    "prescale_gradients": "flag",
    "gradient_predivide_factor": "number",
    "data_types": {"grad_accum_dtype": "text"},
    "checkpoint": {"tag_validation": "text", "load_universal": "flag"},
    "steps_per_print": "number",
    "wall_clock_breakdown": "flag",
    "memory_breakdown": "flag",
    "timers": {"throughput": {"enabled": "flag", "synchronized": "flag"}},
    "dump_state": "flag",
    "log_level": "text",
    "disable_python_gc": "flag",
    "comms_logger": {
        "enabled": "flag",
        "prof_all": "flag",
        "prof_ops": "list",
        "verbose": "flag",
        "debug": "flag",
    },
    "flops_profiler": {
        "enabled": "flag",
        "recompute_fwd_factor": "number",
        "profile_step": "number",
        "module_depth": "number",
        "top_modules": "number",
        "detailed": "flag",
        "output_file": "text",
    },
    "tensorboard": _MONITOR,
    "csv_monitor": _MONITOR,
    "wandb": {"enabled": "flag", "group": "text", "team": "text", "project": "text"},
    "comet": {
        "enabled": "flag",
        "samples_log_interval": "number",
        **dict.fromkeys(("project", "workspace", "api_key", "experiment_name", "experiment_key", "mode"), "text"),
        "online": "flag",
    },
}
"""What DeepSpeed gets as it is."""

SAID_TWICE: Keys = {
    "train_batch_size": "number",
    "train_micro_batch_size_per_gpu": "number",
    "gradient_accumulation_steps": "number",
    "gradient_clipping": "number",
    "bf16": {"enabled": "flag", "check_grad_overflow": "flag"},
    "fp16": {"enabled": "flag"},
    "optimizer": {
        "type": "text",
        "params": {
            "lr": "number",
            "weight_decay": "number",
            "betas": "list",
            "eps": "number",
            "torch_adam": "flag",
            "adam_w_mode": "flag",
            "bias_correction": "flag",
        },
    },
    "managed_gradient_accumulation": "flag",
    "zero_allow_untested_optimizer": "flag",
}
"""What the command line says as well, or this package sets."""

_NO_EFFECT = "Megatron's loop does not use it"
_REMOVED = "DeepSpeed 0.19 has removed it"
_ZERO_PLUS_PLUS = ("no ZeRO++: it is not tested with the audit and the metrics", "remove it")
_NVME = ("no nvme: it is not tested", "remove it, and give the device cpu")
_PRECISION = "Megatron's --bf16 decides the precision"
_NOT_TESTED = "it is not tested with the audit and the metrics"

REFUSED: Mapping[str, tuple[str, str]] = {
    "scheduler": (
        "no scheduler: DeepSpeed's (WarmupLR, WarmupDecayLR, OneCycle, ...) would write LRs of its own into the param"
        " groups, where the width rule's are",
        "remove the block; --lr, --lr-warmup-iters, --lr-decay-style and their neighbours make the schedule",
    ),
    "torch_autocast": (f"no torch_autocast: {_PRECISION}", "remove the block"),
    "amp": (f"no amp: {_PRECISION}", "remove the block"),
    "bfloat16": ("the key bf16, its present name", "rename it"),
    "gradient_allreduce_op": ("no such key: gradients are averaged over the ranks, as Megatron's are", "remove it"),
    "tensor_parallel": ("no tensor_parallel: Megatron has split the model", "give --tensor-model-parallel-size"),
    "sequence_parallel_size": ("no Ulysses: it takes ranks out of Megatron's groups", "give --sequence-parallel"),
    "seq_parallel_communication_data_type": ("no Ulysses: it takes ranks out of Megatron's groups", "remove it"),
    "data_parallel_size": ("no such key: Megatron makes the groups of ranks", "remove it"),
    "expert_parallel": ("no expert_parallel: experts are not supported with --deepspeed", "remove the block"),
    "use_data_before_expert_parallelism": ("no experts: they are not supported with --deepspeed", "remove it"),
    "pipeline": ("no pipeline: Megatron's loop calls the engine once per micro batch", "remove the block"),
    "hybrid_engine": (f"no hybrid_engine: {_NO_EFFECT}", "remove the block"),
    "data_efficiency": (f"no data_efficiency: {_NO_EFFECT}", "remove the block"),
    "dataloader_drop_last": (f"no such key: {_NO_EFFECT}", "remove it"),
    "vocabulary_size": (f"no such key: {_NO_EFFECT}", "remove it; --vocab-size is Megatron's"),
    "disable_allgather": ("no such key: ZeRO does not read it", "remove it"),
    "python_gc": ("the key disable_python_gc, as DeepSpeed spells it", "rename it"),
    "activation_checkpointing": (
        f"no activation_checkpointing: {_NO_EFFECT}",
        "remove the block; --recompute-granularity does it",
    ),
    "compile": ("no DeepCompile: it does not go with a backward pass that Megatron calls", "remove the block"),
    "autotuning": ("no autotuning: it starts runs of its own", "remove the block"),
    "aio": ("no aio: it is for nvme, which is not tested", "remove the block"),
    "nebula": (f"no nebula: {_REMOVED}", "remove the block"),
    "datastates_ckpt": (f"no datastates_ckpt: {_NOT_TESTED}", "remove the block"),
    "elasticity": (f"no elasticity: {_REMOVED}", "remove the block"),
    "curriculum_learning": (f"no curriculum_learning: {_REMOVED}", "remove the block"),
    "compression_training": (f"no compression: {_REMOVED}", "remove the block"),
    "quantize_training": (f"no quantize_training: {_REMOVED}", "remove the block"),
    "eigenvalue": (f"no eigenvalue: {_REMOVED}", "remove the block"),
    "sparse_attention": (f"no sparse_attention: {_REMOVED}", "remove the block"),
    "graph_harvesting": (f"no graph_harvesting: {_REMOVED}", "remove it"),
    "progressive_layer_drop": (f"no progressive_layer_drop: {_REMOVED}", "remove the block"),
    "sparse_gradients": (f"no sparse_gradients: {_REMOVED}", "remove it"),
    "weight_quantization": ("no weight_quantization: it changes the parameters", "remove the block"),
    "bf16.bf16_master_weights_and_grads": (
        "false: without fp32 weights small updates are lost, and the audit and the metrics have none to read",
        "remove it",
    ),
    "bf16.bf16_optimizer_states": ("false: Adam's state is kept in fp32, as Megatron keeps it", "remove it"),
    "bf16.immediate_grad_update": (f"false: {_NOT_TESTED}", "remove it"),
    "data_types.param_dtype": (f"no param_dtype: {_PRECISION}", "remove it"),
    "data_types.buffer_dtype": (f"no buffer_dtype: {_PRECISION}", "remove it"),
    "data_types.keep_in_fp32_modules": (f"no keep_in_fp32_modules: {_PRECISION}", "remove it"),
    "checkpoint.use_node_local_storage": ("no node-local checkpoints: Megatron's part is in one place", "remove it"),
    "checkpoint.parallel_write": ("no parallel_write: it is for pipelines of DeepSpeed's", "remove it"),
    "checkpoint.writer": (f"no writer: {_NOT_TESTED}", "remove it"),
    "checkpoint.checkpoint_serialization": (f"no such key: {_NOT_TESTED}", "remove it"),
    "optimizer.legacy_fusion": ("no legacy_fusion: it is for fp16 at stage 0", "remove it"),
    "optimizer.params.max_grad_norm": ("no such key: DeepSpeed does not clip by it", "remove it; give --clip-grad"),
    "zero_optimization.zenflow": ("no ZenFlow: it updates parameters out of step with the scheduler", "remove it"),
    "zero_optimization.zero_hpz_partition_size": _ZERO_PLUS_PLUS,
    "zero_optimization.zero_quantized_weights": _ZERO_PLUS_PLUS,
    "zero_optimization.zero_quantized_nontrainable_weights": _ZERO_PLUS_PLUS,
    "zero_optimization.zero_quantized_gradients": _ZERO_PLUS_PLUS,
    "zero_optimization.zeropp_loco_param": (f"no LoCo: {_REMOVED}", "remove it"),
    "zero_optimization.mics_shard_size": (f"no MiCS: {_REMOVED}", "remove it"),
    "zero_optimization.mics_hierarchical_params_gather": (f"no MiCS: {_REMOVED}", "remove it"),
    "zero_optimization.cpu_offload": ('"offload_optimizer": {"device": "cpu"}, its present form', "write that"),
    "zero_optimization.cpu_offload_param": ('"offload_param": {"device": "cpu"}, its present form', "write that"),
    "zero_optimization.cpu_offload_params": ('"offload_param": {"device": "cpu"}, its present form', "write that"),
    "zero_optimization.cpu_offload_use_pin_memory": ("pin_memory in the offload block, its present form", "write that"),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "the key stage3_gather_16bit_weights_on_model_save, its present name",
        "rename it",
    ),
    "zero_optimization.round_robin_gradients": (
        "false: DeepSpeed 0.19 then takes other fp32 weights for a parameter's own, in universal checkpoints too",
        "remove it",
    ),
    "zero_optimization.elastic_checkpoint": (
        "no elastic_checkpoint: DeepSpeed 0.19 refuses another number of ranks with it too",
        "remove it; docs/deepspeed.md has the way by a universal checkpoint",
    ),
    "zero_optimization.legacy_stage1": (f"false: {_REMOVED}", "remove it"),
    "zero_optimization.compute_grad_norm": ("true: the norm is logged, and clipped by", "remove it"),
    "zero_optimization.load_from_fp32_weights": (
        "true: a resumed run would go on from rounded weights",
        "remove it",
    ),
    "zero_optimization.parameter_alignment": (f"false: {_NOT_TESTED}", "remove it"),
    "zero_optimization.pipeline_loading_checkpoint": (f"false: {_NOT_TESTED}", "remove it"),
    "zero_optimization.save_muon_momentum_buffer_in_memory": ("no Muon: the rules are derived for AdamW", "remove it"),
    "zero_optimization.leaf_module": (f"no leaf_module: {_NOT_TESTED}", "remove it"),
    "zero_optimization.offload_optimizer.ratio": (
        "1: below it DeepSpeed 0.19 updates a part of the weights by a second optimizer, whose first param group keeps"
        " the LR it was built with",
        "remove it",
    ),
    "zero_optimization.offload_optimizer.super_offload": (
        "false: its second optimizer's first param group keeps the LR it was built with",
        "remove it",
    ),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": ("no such key: it is for super_offload", "remove it"),
    "zero_optimization.offload_optimizer.nvme_path": _NVME,
    "zero_optimization.offload_optimizer.pipeline_read": _NVME,
    "zero_optimization.offload_optimizer.pipeline_write": _NVME,
    "zero_optimization.offload_param.nvme_path": _NVME,
}
"""Dotted key: what was expected, and what to do."""

HARMLESS: Mapping[str, object] = {
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.load_from_fp32_weights": True,
    "zero_optimization.offload_optimizer.ratio": 1,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": 0.8,
    "gradient_allreduce_op": "mean",
    "sequence_parallel_size": 1,
}
"""Values with which a refused key says what is the case anyway; with others false does, with all null."""
