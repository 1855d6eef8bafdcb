"""What a run would train every parameter with, worked out on one machine, without a GPU and without peers.

Up to the optimizer everything is Megatron's own: the validation of the arguments, the process groups of any rank of any
world (over torch's fake backend, which answers at once), the model's builder (on the meta device, where a weight has a
shape and no memory), the param groups and the LR scheduler. The width rule takes the same way into them as in a run.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from megatron_patch.config import Settings
from megatron_patch.upstream.dry.arguments import model_config, settle_vocabulary, validated
from megatron_patch.upstream.dry.coverage import Held, Position, merge
from megatron_patch.upstream.dry.machine import (
    all_positions,
    assigned,
    distinct,
    machine_meant,
    megatrons_checks,
    process_groups,
)
from megatron_patch.upstream.record import hyperparameter_table
from megatron_patch.upstream.width.audit import audit_build
from megatron_patch.upstream.width.bases import cautions, check_bases_used
from megatron_patch.upstream.width.optimizers import emerging_overrides
from megatron_patch.upstream.width.parameters import belongs_to_expert, describe
from megatron_patch.upstream.width.plan import config_overrides, make_plan

# Fields of Megatron's TransformerConfig with which its layers can be built where no GPU and its libraries are.
_NO_KERNELS: dict[str, Any] = {
    "transformer_impl": "local",
    "use_cpu_initialization": True,  # weights are made on the default device, which is meta
    "fp8": None,
    "fp4": None,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "moe_token_dispatcher_type": "alltoall",
}
# Fields with which one rank holds the whole model.
_UNSPLIT: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "context_parallel_size": 1,
    "hierarchical_context_parallel_sizes": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "num_distributed_optimizer_instances": 1,
    "sequence_parallel": False,
    "tp_comm_overlap": False,
    "moe_token_dispatcher_type": "alltoall",
}


@dataclass(frozen=True)
class DryRun:
    """What a run would do."""

    args: Any
    """Megatron's arguments, validated."""
    settings: Settings
    table: Mapping[str, Any]
    """The head of hyperparameters.json: rule, exponents, base."""
    parameters: tuple[Held, ...]
    """Every parameter of the ranks that were built, sorted by name."""
    groups: tuple[Mapping[str, Any], ...]
    """The distinct param groups with a matrix or the LM head in them, without their parameters."""
    seen: str
    """Which ranks were built, and what that proved."""
    notes: tuple[str, ...]
    """What is not quite as it would be on the real machine."""


@dataclass(frozen=True)
class _Blueprint:
    """How to build the model of any rank."""

    config: Any
    """Megatron's GPTModelConfig or HybridModelConfig."""
    any_attention: bool
    """Leave out the attention kernel, which has next to no parameters: the local one knows neither MLA nor CP."""


@dataclass(frozen=True)
class _Built:
    """One rank."""

    where: str
    table: Mapping[str, Any]
    held: tuple[Held, ...]
    groups: tuple[Mapping[str, Any], ...]
    cautions: tuple[str, ...]


def dry_run(
    arguments: Sequence[str],
    *,
    gpu: bool,
    world_size: int | None = None,
    rank: int = 0,
    all_ranks: bool = False,
    ignore_unknown: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DryRun:
    """Return what a run with Megatron's command line `arguments` would train one rank's parameters, or all, with.

    The hooks that put our flags into Megatron's parser must be installed.

    Args:
        arguments: without the script.
        gpu: what `prepare_machine` returned.
        world_size: number of ranks; None = the smallest that holds one copy of the model.
        rank: the one to build.
        all_ranks: instead, build one rank of every distinct position and prove that they add up to the model.
        ignore_unknown: leave out flags that no parser here knows, with a note.
        progress: called with the numbers of ranks built so far and in all.

    Raises:
        ConfigError: arguments that a run would be refused for.
        AuditError: param groups that a run would be refused for, or ranks that do not add up.
    """
    args, notes = validated(arguments, world_size, rank, ignore_unknown)
    settings = Settings.of(vars(args))
    blueprint = _blueprint(args, gpu, notes)
    positions = all_positions(args)
    chosen = distinct(positions) if all_ranks else [positions[rank]]
    built = []
    for number, position in enumerate(chosen):
        progress(number, len(chosen))
        built.append(_on_rank(args, settings, blueprint, position))
    notes += dict.fromkeys(f"--width-scaling: {line}" for b in built for line in b.cautions)
    if all_ranks or args.pipeline_model_parallel_size == 1:  # else there may be layers that were not built
        check_bases_used(settings.width, {held.spec.dimension or "" for b in built for held in b.held})
    parameters, seen = built[0].held, built[0].where
    if all_ranks:
        held = [(position, b.held) for position, b in zip(chosen, built, strict=True)]
        parameters = tuple(merge(held, _whole_model(args, settings, blueprint)))
        seen = (
            f"all {args.world_size} ranks, {len(chosen)} of them built: one of each distinct position. They hold every "
            "parameter of the unsplit model exactly once, and copies agree"
        )
    groups = {tuple(sorted(group.items())): group for b in built for group in b.groups}
    return DryRun(args, settings, built[0].table, parameters, tuple(groups.values()), seen, tuple(notes))


# --- the model's config -----------------------------------------------------------------------------------------------


def _blueprint(args: Any, gpu: bool, notes: list[str]) -> _Blueprint:
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    asked = args.transformer_impl
    with megatrons_checks(), machine_meant():
        settle_vocabulary(args, notes)
        config = model_config(args)
        config.finalize()
        if config.should_pad_vocab:
            tp = args.tensor_model_parallel_size
            config.vocab_size = calculate_padded_vocab_size(
                config.vocab_size, config.make_vocab_size_divisible_by, tp, logging_enabled=False
            )
            config.should_pad_vocab = False
    fields: dict[str, Any] = {"perform_initialization": False, "init_model_with_meta_device": True}
    fields["cuda_graph_impl"] = "none"  # a layer would ask for the random state of a graph
    if not gpu:
        fields |= _NO_KERNELS
        # It wants Transformer Engine's FusedAdam, and changes no param group.
        args.use_precision_aware_optimizer = False
        for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            setattr(args, name, torch.float32)
    elif asked == "local":
        fields["use_cpu_initialization"] = True
    for name, value in fields.items():
        setattr(config.transformer, name, value)
    if not gpu and asked != "local":
        notes.append(
            f"no GPU here: --transformer-impl {asked} is shown with Megatron's local layers, which have the same "
            "parameters with the same shapes, but call a norm input_layernorm.weight, not linear_qkv.layer_norm_weight"
        )
    return _Blueprint(config, any_attention=not gpu and asked != "local")


# --- ranks -----------------------------------------------------------------------------------------------------------


def _build(blueprint: _Blueprint) -> list[Any]:
    """Return this rank's model chunks on the meta device, with the attributes Megatron gives parameters before DDP."""
    from megatron.core import tensor_parallel
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm import mamba_mixer
    from megatron.core.transformer.moe import moe_layer
    from megatron.training.models.dist_utils import build_virtual_pipeline_stages

    from megatron_patch.upstream.cpu.hybrid import local_submodules

    config = blueprint.config
    with contextlib.ExitStack() as stack:
        stack.enter_context(megatrons_checks())
        # Nothing is drawn, and no generator for it is set up.
        stack.enter_context(assigned(mamba_mixer, get_cuda_rng_tracker=lambda: _NoGenerator))
        if blueprint.any_attention:
            stack.enter_context(assigned(LocalSpecProvider, core_attention=lambda self: _Attention))
            stack.enter_context(assigned(hybrid_stack_spec, submodules=local_submodules()))
            stack.enter_context(assigned(moe_layer, HAVE_TE=True, TELinear=_Duplicated))
        stack.enter_context(torch.device("meta"))
        chunks: list[Any] = build_virtual_pipeline_stages(
            config.get_builder_cls()(config).build_model,
            ProcessGroupCollection.use_mpu_process_groups(),
            config.transformer.virtual_pipeline_model_parallel_size,
        )
    for chunk in chunks:
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return chunks


class _NoGenerator:
    """In the place of Megatron's tracker of random states."""

    fork = contextlib.nullcontext


class _Duplicated(torch.nn.Module):
    """Stands in for the one layer of which there is no local kind: MoE's projections into and out of the latent."""

    def __init__(self, input_size: int, output_size: int, *, bias: bool, **unused: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size))
        self.register_parameter("bias", torch.nn.Parameter(torch.empty(output_size)) if bias else None)


class _Attention(torch.nn.Module):
    """Stands in for the attention kernel, whose only parameter, if any, is one softmax offset per head."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads))


def _on_rank(args: Any, settings: Settings, blueprint: _Blueprint, position: Position) -> _Built:
    """Build one rank's model and param groups, audit the groups as a run does, and read back what is in them."""
    from megatron.core.optimizer import _get_param_groups
    from megatron.training import training

    transformer = blueprint.config.transformer
    width = settings.width.described
    with process_groups(args, position.rank) as state:
        assert (
            Position(
                torch.distributed.get_rank(),
                state.get_tensor_model_parallel_rank(),
                state.get_pipeline_model_parallel_rank(),
                state.get_expert_model_parallel_rank(),
                state.get_expert_tensor_parallel_rank(),
            )
            == position
        ), "Megatron numbers its ranks in another way"
        chunks = _build(blueprint)
        parameters = list(describe(chunks, transformer, width, state))
        with megatrons_checks():
            config, overrides = training.get_megatron_optimizer_config(args)
        if args.use_mup:
            overrides = overrides | training.get_mup_config_overrides(
                config=config, mup_width_mult=transformer.mup_width_mult, optimizer_type=config.optimizer
            )
        plan = make_plan(
            parameters,
            width,
            config,
            args.end_weight_decay,
            use_mup=args.use_mup,
            scope_key=settings.warmup.scope == "width-dependent",
        )
        with megatrons_checks():
            everyones = {**overrides, **config_overrides(plan), **emerging_overrides(config)}
            groups = _get_param_groups(chunks, config, everyones)
        optimizer = _as_optimizer(groups)
        audit_build(plan, optimizer)
        where = (
            f"rank {position.rank} of {args.world_size}: "
            f"tensor {position.tensor} of {args.tensor_model_parallel_size}, "
            f"pipeline {position.pipeline} of {args.pipeline_model_parallel_size}, "
            f"data {state.get_data_parallel_rank()} of {state.get_data_parallel_world_size()}"
        )
        if args.num_experts:
            where += f", expert {position.expert} of {args.expert_model_parallel_size}"
    table = hyperparameter_table(plan, optimizer)
    entries = {entry["name"]: entry for entry in table.pop("parameters")}
    held = [
        Held(
            spec=p.spec,
            local_shape=tuple(p.parameter.shape),
            split=bool(getattr(p.parameter, "tensor_model_parallel", False)),
            is_expert=belongs_to_expert(p.spec.name),
            assumed=p.assumed,
            values=entries[p.spec.name],
        )
        for p in parameters
    ]
    scaled = {id(p.parameter) for p in parameters if p.spec.role in ("matrix", "output")}
    return _Built(
        where,
        table,
        tuple(sorted(held, key=lambda h: h.spec.name)),
        tuple(
            {key: value for key, value in group.items() if key != "params"}
            for group in groups
            if any(id(parameter) in scaled for parameter in group["params"])
        ),
        tuple(cautions(width, parameters)),
    )


def _as_optimizer(groups: Sequence[dict[str, Any]]) -> Any:
    """Return param groups in the shape of Megatron's chained optimizer, as the audit reads it.

    It has one for each of its optimizers (adam beside muon), and another for the experts.
    """
    from megatron.core.optimizer.optimizer import FP32Optimizer

    children = {}
    for group in groups:
        key = group.get("optimizer"), group["is_expert_parallel"]
        if key not in children:
            children[key] = object.__new__(FP32Optimizer)  # its constructor wants gradients
            children[key].optimizer = SimpleNamespace(param_groups=[])
        children[key].optimizer.param_groups.append(group)
    return SimpleNamespace(chained_optimizers=list(children.values()))


def _whole_model(args: Any, settings: Settings, blueprint: _Blueprint) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter of the model on a single rank."""
    config, args = copy.copy(blueprint.config), copy.copy(args)
    vars(config)["transformer"] = transformer = copy.copy(config.transformer)
    for name, value in _UNSPLIT.items():
        for owner in (transformer, args):
            if hasattr(owner, name):
                setattr(owner, name, value)
    if args.hybrid_layer_pattern:
        config.hybrid_layer_pattern = args.hybrid_layer_pattern.replace("|", "")  # where stages begin
    args.world_size = 1
    with process_groups(args, 0) as state:
        chunks = _build(replace(blueprint, config=config))
        return {p.spec.name: p.spec.shape for p in describe(chunks, transformer, settings.width.described, state)}
