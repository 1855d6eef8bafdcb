"""--init-scaling fan-in on built models: the std of every weight is 1/sqrt of its own global fan-in."""

import math
from typing import Any

import pytest

from tests.support.building import Builder
from tests.support.param_groups import MODELS, TWO_RANKS
from tests.support.pool import Pool, RankFailure

# What multiplies how many inputs, by hand; all models are 64 wide. Embeddings have 64 too: std 1/sqrt(hidden).
FAN_IN = {
    "llama": {"linear_proj": 4 * 24, "linear_fc2": 96},
    "moe": {
        "layers.0.mlp.linear_fc2": 96,
        "linear_proj": 4 * 24,
        "local_experts.0.linear_fc2": 48,
        "local_experts.1.linear_fc2": 48,
        "local_experts.2.linear_fc2": 48,
        "local_experts.3.linear_fc2": 48,
        "shared_experts.linear_fc2": 80,
    },
    "mla": {"linear_q_up_proj": 24, "linear_kv_up_proj": 40, "linear_proj": 4 * 20, "linear_fc2": 96},
    "tied": {"linear_fc2": 256},
}


def weights(argv: list[str]) -> dict[str, Any]:
    """The whole model's parameters as Megatron trains them, by name, after its set-up."""
    import torch
    from megatron.core import parallel_state

    from tests.support.training import global_names

    built = Builder().build(argv)
    found = {}
    for name, parameter in global_names(built.model).items():
        value = parameter.detach().clone()
        expert = ".local_experts." in name
        group = (
            parallel_state.get_expert_tensor_parallel_group()
            if expert
            else parallel_state.get_tensor_model_parallel_group()
        )
        size = group.size()
        shards = [torch.empty_like(value) for _ in range(size)]
        torch.distributed.all_gather(shards, value.contiguous(), group=group)
        if getattr(parameter, "tensor_model_parallel", False) and size > 1:
            # A gated fc1 holds its part of the gate and its part of the up projection, one after the other.
            pieces = [shard.chunk(parameter.partition_stride, parameter.partition_dim) for shard in shards]
            ordered = [piece[i] for i in range(parameter.partition_stride) for piece in pieces]
            found[name] = torch.cat(ordered, parameter.partition_dim).numpy()
        else:
            assert all(torch.equal(value, shard) for shard in shards), f"{name} differs between the ranks"
            found[name] = value.numpy()
    return found


def fan_in(model: str, name: str) -> int:
    special = [size for part, size in FAN_IN[model].items() if f".{part}." in f".{name}"]
    assert len(special) <= 1
    return special[0] if special else 64


@pytest.mark.parametrize("model", FAN_IN)
def test_std_is_that_of_the_own_fan_in_at_any_tensor_parallel_size(model: str, pool: Pool):
    """Every matrix, router and gate included; split over two ranks they are bit for bit the same matrices."""
    argv = [*MODELS[model].flags.split(), "--init-scaling", "fan-in"]
    (whole,) = pool.run(weights, argv=argv)
    assert sorted(whole) == sorted(MODELS[model].table)
    for name, value in whole.items():
        if value.ndim == 1:
            assert set(value) == ({1.0} if "norm.weight" in name else {0.0}), name
            continue
        std = 1 / math.sqrt(fan_in(model, name))
        # Five standard errors of the RMS of so many Gaussian numbers; the smallest has 64, most have thousands.
        assert math.sqrt((value**2).mean()) == pytest.approx(std, rel=5 / math.sqrt(2 * value.size)), name
    for split in pool.run(weights, ranks=2, argv=[*argv, *TWO_RANKS.split()]):
        assert sorted(split) == sorted(whole)
        for name, value in whole.items():
            assert (split[name] == value).all(), name


@pytest.mark.parametrize("argv", ["--init-method-std 0.3 --num-layers 2", "--embedding-init-method-std 0.7", "--bf16"])
def test_whatever_std_megatron_was_given(argv: str, pool: Pool):
    """The std by fan-in does not depend on Megatron's own settings, nor on the depth of the model."""
    (whole,) = pool.run(
        rms_of_weights, argv=[*MODELS["llama"].flags.split(), *argv.split(), "--init-scaling", "fan-in"]
    )
    for name, (size, rms) in whole.items():
        wanted = 1 / math.sqrt(fan_in("llama", name))
        assert rms == pytest.approx(wanted, rel=5 / math.sqrt(2 * size) + 2**-9), name


def rms_of_weights(argv: list[str]) -> dict[str, tuple[int, float]]:
    """(Number of entries, RMS) of every matrix, from what the optimizer steps."""
    from tests.support.building import groups_of
    from tests.support.training import global_names

    built = Builder().build(argv)
    names = {id(parameter): name for name, parameter in global_names(built.model).items()}
    found = {}
    for _, tensor, parameter in groups_of(built.optimizer):
        if parameter.dim() > 1:
            stepped = tensor.detach().double()
            assert abs(stepped - parameter.detach().double().view_as(stepped)).max() == 0, "the fp32 copy is another"
            found[names[id(parameter)]] = (tensor.numel(), float(stepped.square().mean().sqrt()))
    return found


def tied_copies(argv: list[str]) -> Any:
    """This rank's copy of the word embedding."""
    from tests.support.training import global_names

    names = global_names(Builder().build(argv).model)
    return next(p.detach().numpy() for n, p in names.items() if "word_embeddings" in n or "output_layer" in n)


def test_both_copies_of_a_tied_embedding_stay_equal(pool: Pool):
    """First and last pipeline stage scale their copies by themselves; nothing would notice different factors later."""
    argv = [
        *MODELS["tied"].flags.split(),
        *"--pipeline-model-parallel-size 2 --num-layers 2 --init-scaling fan-in".split(),
    ]
    first, last = pool.run(tied_copies, ranks=2, argv=argv)
    assert (first == last).all()
    assert math.sqrt((first**2).mean()) == pytest.approx(1 / 8, rel=0.05)


def odd_layer(argv: list[str]) -> None:
    """Set up a model whose linear_fc1 was not drawn with Megatron's std."""
    from megatron_patch.upstream.width import planned
    from tests.support.training import global_names

    original = planned.describe

    def after_meddling(model: Any, *rest: Any) -> Any:
        global_names(model)["decoder.layers.0.mlp.linear_fc1.weight"].data.mul_(3)
        return original(model, *rest)

    planned.describe = after_meddling
    Builder().build(argv)


def test_a_layer_with_an_initialisation_of_its_own_is_refused(pool: Pool):
    """Rescaling is right only for a std that is known; a model that sets its own weights is not quietly changed."""
    argv = [*MODELS["llama"].flags.split(), "--init-scaling", "fan-in"]
    with pytest.raises(RankFailure, match=r"0\.mlp\.linear_fc1\.weight has RMS 0\.0[56]\d*, which is none"):
        pool.run(odd_layer, argv=argv)


def test_without_the_flag_the_weights_are_megatrons(pool: Pool):
    """A width rule alone must not touch the initial weights."""
    flags = MODELS["llama"].flags.split()
    (plain,) = pool.run(weights, argv=flags)
    (ruled,) = pool.run(weights, argv=[*flags, *f"--width-scaling sqrt {MODELS['llama'].base}".split()])
    assert all((plain[name] == ruled[name]).all() for name in plain)
