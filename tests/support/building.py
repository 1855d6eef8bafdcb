"""Builds a model and its optimizer through Megatron's own `setup_model_and_optimizer`, for jobs of the pool.

`live` reads back what the optimizer trains every parameter with, by ways of its own: names from
`tests.support.training`, parameters paired with param groups through the tensors that the optimizer really steps.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.support.training import global_names

# What every model here has; a repeated flag wins. No warmup: the first LR is the peak.
COMMON: tuple[str, ...] = tuple(
    "--num-layers 1 --hidden-size 64 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1 --global-batch-size 2 --train-iters 100 --lr 0.01 --min-lr 0.001 --lr-decay-style linear "
    "--weight-decay 0.1 --adam-eps 1e-8 --tokenizer-type NullTokenizer --vocab-size 63 "
    "--make-vocab-size-divisible-by 32 --attention-dropout 0 --hidden-dropout 0".split()
)
LLAMA_STYLE = (
    "--swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights "
    "--position-embedding-type rope"
)


@dataclass
class Built:
    """The live objects of a run that has not made a step."""

    args: Any
    model: list[Any]
    optimizer: Any
    scheduler: Any
    plan: Any = None
    """What the package wants every parameter to be trained with; None without flags of ours."""


@dataclass
class Builder:
    """Builds one run after another in one process, all with the same parallel layout."""

    session: Any = None
    plan: Any = None

    def parse(self, argv: Sequence[str], gpu_argv: Sequence[str] = ()) -> Any:
        """Return Megatron's arguments, parsed and checked by it and by us; the hooks they ask for are installed.

        The flags in `gpu_argv` are among those that the CPU platform refuses.
        """
        from megatron.training import arguments, global_vars
        from megatron.training.arguments import parse_and_validate_args

        from megatron_patch.upstream.cpu.platform import cpu_arguments
        from megatron_patch.upstream.patch import Session
        from megatron_patch.upstream.width import planned

        if self.session is None:
            arguments._print_args = lambda title, args: None
            planned.audit_build = self._note_plan(planned.audit_build)
            self.session = Session()
            self.session.begin()
        while len(self.session.installed) > 1:
            self.session.installed.pop().remove()
        global_vars.unset_global_variables()
        mla = "--multi-latent-attention"  # refused, for it cannot run; it can be built
        words = cpu_arguments([*COMMON, *(word for word in argv if word != mla)])[0]
        sys.argv = ["train", *words, *(word for word in argv if word == mla), *gpu_argv]
        return parse_and_validate_args()

    def build(self, argv: Sequence[str]) -> Built:
        """Parse, and set model, optimizer and scheduler up as `pretrain` does."""
        from megatron.core.enums import ModelType
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.rerun_state_machine import destroy_rerun_state_machine
        from megatron.training import training
        from megatron.training.argument_utils import (
            gpt_config_from_args,
            hybrid_config_from_args,
            pretrain_cfg_container_from_args,
        )
        from megatron.training.initialize import initialize_megatron

        args = self.parse(argv)
        self.plan = None
        if args.multi_latent_attention:
            _let_mla_build()
        destroy_rerun_state_machine()
        initialize_megatron()
        model_config = (hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args)(args)
        config = pretrain_cfg_container_from_args(args, model_config)
        model, optimizer, scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=config,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        return Built(args, model, optimizer, scheduler, self.plan)

    def _note_plan(self, audit_build: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def noting(plan: Any, optimizer: Any) -> None:
            self.plan = plan
            audit_build(plan, optimizer)

        return noting


def _let_mla_build() -> None:
    """Megatron's local attention kernel does not take MLA's head sizes; it has no parameters, so anything will do."""
    import torch
    from megatron.core.models.backends import LocalSpecProvider

    class Attention(torch.nn.Module):
        def __init__(self, **sizes: Any) -> None:
            super().__init__()

    LocalSpecProvider.core_attention = lambda self: Attention


def groups_of(optimizer: Any) -> Iterator[tuple[dict[str, Any], Any, Any]]:
    """Yield every (param group, tensor that is stepped, its model parameter) of this rank."""
    for child in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(child, "is_stub_optimizer", False):
            continue
        of_model = {}
        for ours, stepped in (
            ("model_float16_groups", "shard_fp32_from_float16_groups"),
            ("model_fp32_groups", "shard_fp32_groups"),
            ("float16_groups", "fp32_from_float16_groups"),
        ):
            for parameters, tensors in zip(getattr(child, ours, []), getattr(child, stepped, []), strict=True):
                of_model.update({id(t): p for p, t in zip(parameters, tensors, strict=True) if t is not None})
        for group in child.optimizer.param_groups:
            for tensor in group["params"]:
                yield group, tensor, of_model.get(id(tensor), tensor)


def live(built: Built) -> dict[str, dict[str, float]]:
    """Return what this rank's optimizer trains each of its parameters with, by the name in the unsplit model."""
    names = {id(parameter): name for name, parameter in global_names(built.model).items()}
    found: dict[str, dict[str, float]] = {}
    for group, _, parameter in groups_of(built.optimizer):
        name = names[id(parameter)]
        assert name not in found, f"{name} is in two groups"
        found[name] = {key: group[key] for key in ("max_lr", "min_lr", "lr", "weight_decay", "eps")}
    return found
