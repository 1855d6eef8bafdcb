"""Trains a small GPT with Megatron's own `pretrain` inside a job of the pool (tests/support/pool.py).

With `--hybrid-layer-pattern` it is a hybrid model.

    from tests.support.training import TINY, Outcome, train

    def test_tensor_parallel_is_exact(pool: Pool) -> None:
        one = pool.run(train, argv=TINY, steps=4)[0]
        two = pool.run(train, ranks=2, argv=[*TINY, "--tensor-model-parallel-size", "2"], steps=4)[0]
        assert two.losses == pytest.approx(one.losses, abs=1e-5)

`argv` are Megatron's flags; what they repeat of `TINY` wins, as the last of a repeated flag does. The CPU flags are
added. To do something inside the run (install hooks, look at the optimizer, measure), subclass `Hooks` at module
level and pass an instance, e.g. `pool.run(train, argv=TINY, steps=2, hooks=MyHooks())`; what its `result` returns
comes back in `Outcome.extra`.

The data are sequences made from a fixed seed by their index, handed out by Megatron's own sampler, so every
data-parallel size sees the same global batches and a resumed run goes on where it stopped.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

# 2 layers, 32 wide, 32 tokens: a step takes a few milliseconds. No dropout, so that results compare across layouts.
TINY: tuple[str, ...] = tuple(
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --min-lr 1e-3 --lr-decay-iters 100 --lr-warmup-iters 2 "
    "--attention-dropout 0 --hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 63 "
    "--make-vocab-size-divisible-by 32 --eval-iters 0 --eval-interval 1000 --log-interval 1 --num-workers 0".split()
)
# 4 experts, 2 per token, and a shared expert, for `argv=[*TINY, *MOE]`.
MOE: tuple[str, ...] = tuple(
    "--num-experts 4 --moe-router-topk 2 --moe-shared-expert-intermediate-size 32 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --disable-bias-linear".split()
)


@dataclass
class Run:
    """The live objects of a run, as hooks see them."""

    args: Any
    model: list[Any]  # chunks of the model, wrapped as Megatron wraps them
    optimizer: Any
    scheduler: Any


class Hooks:
    """Override what you need; every method runs on every rank."""

    def before_arguments(self) -> None:
        """Before Megatron parses its flags: the place to install hooks."""

    def built(self, run: Run) -> None:
        """Model, optimizer and scheduler are built, the checkpoint is loaded, no step is taken."""

    def stepped(self, run: Run, iteration: int, losses: dict[str, float]) -> None:
        """After the `iteration`-th step (from 1). `losses` is empty where no loss is computed."""

    def ended(self, run: Run) -> None:
        """After the last step, before `result`."""

    def result(self, run: Run) -> Any:
        """After the last step; the value, pickled, becomes `Outcome.extra`."""
        return None


class Patched(Hooks):
    """A run with the patch, as a user has it."""

    def before_arguments(self) -> None:
        from megatron_patch.upstream.patch import Session

        Session().begin()


@dataclass(frozen=True)
class Checksum:
    """A final parameter: the norm of the whole tensor, comparable over layouts, and a digest, over equal layouts."""

    norm: float
    digest: str


@dataclass
class Outcome:
    """What a run did. Equal on all ranks but for `extra`.

    Args:
        losses: mean loss per token of each step.
        grad_norms: of each step, before clipping.
        checksums: by parameter name with global layer and expert number, e.g. "decoder.layers.1.mlp.linear_fc1.weight".
        extra: what `Hooks.result` returned on this rank.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    checksums: dict[str, Checksum] = field(default_factory=dict)
    extra: Any = None


def train(argv: Sequence[str], *, steps: int, hooks: Hooks | None = None) -> Outcome:
    """Trains until iteration `steps` and returns the outcome of the steps done here. To be run in a job of the pool.

    Args:
        argv: Megatron's flags (and ours, if a hook installs them), without the CPU flags.
        steps: the iteration after which to stop. `--train-iters` is set to it unless `argv` has it; a smaller `steps`
            then stops as `--exit-interval` does, after writing a checkpoint if `--save` is given.
        hooks: see `Hooks`.
    """
    from megatron.core.datasets import utils as dataset_utils
    from megatron.core.enums import ModelType
    from megatron.training import training
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        hybrid_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from megatron_patch.upstream.cpu.platform import cpu_arguments
    from megatron_patch.upstream.datasets import skip_compile_helpers

    hooks = hooks or Hooks()
    dataset_utils.compile_helpers = skip_compile_helpers(dataset_utils.compile_helpers)
    hooks.before_arguments()
    length = ["--exit-interval" if "--train-iters" in argv else "--train-iters", str(steps)]
    sys.argv = ["train", *cpu_arguments([*argv, *length])[0]]
    args = parse_and_validate_args()
    outcome = Outcome()
    live: list[Run] = []

    # The two places of Megatron's loop we listen to, wrapped after anything a hook has installed there.
    original_train, original_log = training.train, training.training_log

    def listening_train(
        forward_step_func: Any, model: Any, optimizer: Any, scheduler: Any, *rest: Any, **more: Any
    ) -> Any:
        live.append(Run(args, model, optimizer, scheduler))
        hooks.built(live[0])
        return original_train(forward_step_func, model, optimizer, scheduler, *rest, **more)

    def listening_log(loss_dict: Any, total: Any, rate: Any, iteration: int, *rest: Any, **more: Any) -> Any:
        losses = {name: float(value) for name, value in loss_dict.items()}
        outcome.losses.extend(losses[name] for name in ("lm loss",) if name in losses)
        outcome.grad_norms.append(float(rest[3]))
        hooks.stepped(live[0], iteration, losses)
        return original_log(loss_dict, total, rate, iteration, *rest, **more)

    training.train, training.training_log = listening_train, listening_log
    model = (hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args)(args)
    config = pretrain_cfg_container_from_args(args, model)
    try:
        training.pretrain(config, _datasets, ModelType.encoder_or_decoder, _forward_step)
    except SystemExit as stop:  # how --exit-interval ends
        if stop.code:
            raise
    outcome.losses = _of_any_rank(outcome.losses)
    outcome.checksums = checksums(live[0].model)
    hooks.ended(live[0])
    outcome.extra = hooks.result(live[0])
    return outcome


def _of_any_rank(losses: list[float]) -> list[float]:
    """The losses, which only the last pipeline stage knows, on every rank."""
    import torch

    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, losses)
    return next((entry for entry in found if entry), [])


# --- data and loss ---------------------------------------------------------------------------------------------------


def _datasets(sizes: Sequence[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    from megatron.training import get_args
    from torch.utils.data import Dataset

    class Sequences(Dataset[Any]):
        def __init__(self, size: int, first: int) -> None:
            self.size, self.first = size, first

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, index: int) -> dict[str, Any]:
            return _sequence(self.first + index, get_args().seq_length, get_args().vocab_size)

    train, valid, test = (
        Sequences(size, first) if size else None for size, first in zip(sizes, (0, 10**6, 2 * 10**6), strict=True)
    )
    return train, valid, test


_datasets.is_distributed = True  # type: ignore[attr-defined]  # Megatron: build it on every rank


def _sequence(index: int, length: int, vocabulary: int) -> dict[str, Any]:
    """The `index`-th sample, `length` tokens, each 1 to 3 after the one before, so that there is something to learn."""
    import torch

    generator = torch.Generator().manual_seed(index)
    steps = torch.randint(1, 4, (length + 1,), generator=generator)
    steps[0] += int(torch.randint(vocabulary, (1,), generator=generator))
    tokens = steps.cumsum(0) % vocabulary
    return {
        "tokens": tokens[:-1],
        "labels": tokens[1:],
        "loss_mask": torch.ones(length),
        "position_ids": torch.arange(length),
    }


def _forward_step(iterator: Any, model: Any) -> tuple[Any, Callable[[Any], Any]]:
    """As pretrain_gpt.py's, but every rank reads its own data, so no broadcast is needed."""
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss(losses: Any) -> Any:
        import torch

        total = losses.float().sum()
        number = torch.tensor(losses.numel(), dtype=torch.int)
        return total, number, {"lm loss": torch.stack([total.detach(), number.float()])}

    return output, loss


# --- checksums -------------------------------------------------------------------------------------------------------


def checksums(model: Sequence[Any]) -> dict[str, Checksum]:
    """A `Checksum` of every parameter of the model over all ranks, which must call it together.

    Also asserts that ranks that should hold the same copy of a shard do.
    """
    import torch
    from megatron.core import parallel_state

    mine: dict[str, dict[int, tuple[float, str]]] = {}
    for name, parameter in global_names(model).items():
        sharded = getattr(parameter, "tensor_model_parallel", False)
        expert = ".experts." in name
        rank = (
            parallel_state.get_expert_tensor_parallel_rank()
            if expert
            else parallel_state.get_tensor_model_parallel_rank()
        )
        values = whole(parameter).float().contiguous()
        digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
        mine[name] = {rank if sharded else 0: (float(values.double().square().sum()), digest)}
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    merged: dict[str, dict[int, tuple[float, str]]] = {}
    for rank, theirs in enumerate(everyone):
        for name, shards in theirs.items():
            for shard, content in shards.items():
                known = merged.setdefault(name, {}).setdefault(shard, content)
                assert known == content, f"rank {rank} holds another copy of {name}, shard {shard}"
    return {
        name: Checksum(
            norm=sum(square for square, _ in shards.values()) ** 0.5,
            digest=hashlib.sha256("".join(shards[shard][1] for shard in sorted(shards)).encode()).hexdigest(),
        )
        for name, shards in sorted(merged.items())
    }


def whole(parameter: Any) -> Any:
    """A parameter that FSDP shards, put together over the data-parallel ranks, which must call it together."""
    import torch

    values = parameter.detach()
    if not hasattr(values, "to_local"):
        return values
    mesh, shape = values.device_mesh, values.shape
    if hasattr(parameter, "orig_param"):  # Megatron-FSDP's, cut anywhere; tensor parallelism is left as it is
        mesh, shape = mesh["dp_cp"], parameter.orig_param.shape
    parts: list[Any] = [None] * mesh.size()
    torch.distributed.all_gather_object(parts, values.to_local().flatten(), group=mesh.get_group())
    return torch.cat(parts)[: shape.numel()].view(shape)  # where it is not sharded, the first rank's


def global_names(model: Sequence[Any]) -> dict[str, Any]:
    """This rank's parameters by the name they have in a model that is not split.

    That is: layers and experts are counted globally, and the last pipeline stage's copy of tied embeddings goes by the
    name of the original.
    """
    from megatron.core import parallel_state
    from megatron.core.ssm.mamba_layer import MambaLayer
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.transformer_layer import TransformerLayer

    found = {}
    for chunk in model:
        if hasattr(chunk, "synchronize_param_gather"):  # Megatron-FSDP: show the shards that it trains
            chunk.synchronize_param_gather()
        while hasattr(chunk, "module"):
            chunk = chunk.module
        renamed: dict[str, str] = {}  # prefix of a module here -> prefix in the whole model
        for name, module in chunk.named_modules():
            if isinstance(module, (TransformerLayer, MambaLayer)):
                renamed[f"{name}."] = f"{name.rpartition('.')[0]}.{module.layer_number - 1}."
            if isinstance(module, SequentialMLP):
                first = parallel_state.get_expert_model_parallel_rank() * module.num_local_experts
                for local in range(module.num_local_experts):
                    renamed[f"{name}.local_experts.{local}."] = f"local_experts.{first + local}."
        for name, parameter in chunk.named_parameters():
            whole = "embedding.word_embeddings.weight" if getattr(parameter, "shared", False) else name
            for prefix, replacement in sorted(renamed.items(), key=lambda item: -len(item[0])):
                if name.startswith(prefix) and "local_experts" in prefix:
                    whole = f"{prefix[: prefix.rindex('local_experts')]}{replacement}{name.removeprefix(prefix)}"
                elif name.startswith(prefix):
                    whole = replacement + whole.removeprefix(prefix)
            found[whole] = parameter
    return found
