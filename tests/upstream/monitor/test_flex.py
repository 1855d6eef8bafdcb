"""Metrics of experts behind the flex dispatcher, whose order of tokens nobody knows; DeepEP has a stand-in."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.upstream.monitor.experts import fingerprints
from tests.support.flex import FLEX, Flex
from tests.support.layouts import EP2, METRICS, MIXTURE, SAMPLED, SP, STEPS, TP2, differences
from tests.support.monitored import read_lines
from tests.support.pool import Pool, RankFailure
from tests.support.training import TINY, train

LAYOUTS = {
    "ep2": (2, 2, EP2),
    "tp2-sp": (2, 1, (*TP2, *SP)),
    "tp2-etp1-ep2": (2, 1, (*TP2, *SP, *EP2, "--expert-tensor-parallel-size", "1")),
    "tp2-ep2-sp": (4, 2, (*TP2, *SP, *EP2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_metric_is_that_of_full_matrices_in_float64(pool: Pool, tmp_path: Path, layout: str) -> None:
    ranks, data_ranks, flags = LAYOUTS[layout]
    hooks = Flex(str(tmp_path), spectral=1, tokens=SAMPLED)
    pool.run(train, ranks=ranks, argv=[*TINY, *MIXTURE.flags(), *FLEX, *flags], steps=STEPS, hooks=hooks)
    worst = differences(MIXTURE, read_lines(tmp_path), data_ranks)
    assert max(worst[metric][0] for metric in METRICS) < 1e-5, worst


def test_what_experts_put_out_is_measured_alone(pool: Pool, tmp_path: Path) -> None:
    """Tokens are found where they enter, also if nothing is measured there."""
    argv = [*TINY, *MIXTURE.flags(), *FLEX, *EP2]
    for name, layers in (("all", ".*"), ("fc2", r"experts\..*linear_fc2")):
        hooks = Flex(str(tmp_path / name), tokens=SAMPLED, layers=layers)
        pool.run(train, ranks=2, argv=argv, steps=STEPS, hooks=hooks)
    whole, alone = read_lines(tmp_path / "all"), read_lines(tmp_path / "fc2")
    assert {layer for _, layer in alone} and all("linear_fc2" in layer for _, layer in alone)
    for key, line in alone.items():
        assert [line[metric] for metric in METRICS] == [whole[key][metric] for metric in METRICS]


def test_a_dispatcher_that_changes_tokens_stops_the_run(pool: Pool, tmp_path: Path) -> None:
    hooks = Flex(str(tmp_path), tokens=SAMPLED, changes=True)
    with pytest.raises(RankFailure, match="a token that its routers sent is not among them"):
        pool.run(train, ranks=2, argv=[*TINY, *MIXTURE.flags(), *FLEX, *EP2], steps=1, hooks=hooks)


@given(st.integers(1, 600), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.integers(0, 2**32))
def test_a_fingerprint_is_that_of_the_bits(width: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(50, width, generator=generator).to(dtype)
    found = fingerprints(tokens)
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    assert len(found.unique()) == len(tokens.view(bits).unique(dim=0))
    order = torch.randperm(50, generator=generator)
    assert torch.equal(fingerprints(tokens[order].clone()), found[order])
    changed = tokens.clone()
    changed.view(bits)[:, seed % width] ^= 1  # the last bit of one number
    assert not (fingerprints(changed) == found).any()
