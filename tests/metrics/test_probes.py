"""Which tokens are sampled, and that hooks exist only while they are wanted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.metrics.probes import Probes
from megatron_patch.metrics.sample import Sample, sample_positions
from megatron_patch.metrics.views import Captured, CapturePoint


@given(total=st.integers(0, 300), count=st.integers(0, 300), seed=st.integers(0, 2**31))
def test_positions_are_distinct_spread_and_the_same_everywhere(total: int, count: int, seed: int) -> None:
    positions = sample_positions(total, count, seed)
    n = min(total, count)
    assert len(positions) == n
    assert positions.tolist() == sorted(set(positions.tolist()))
    for i, position in enumerate(positions.tolist()):  # one in each stretch
        assert i * total // n <= position < (i + 1) * total // n
    torch.rand(3)  # torch's own random state plays no role
    assert torch.equal(positions, sample_positions(total, count, seed))


def test_drawing_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    sample_positions(100, 10, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_other_iterations_look_at_other_tokens() -> None:
    assert not torch.equal(sample_positions(1000, 10, 1), sample_positions(1000, 10, 2))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_scattered_tokens_are_the_same_tokens(ranks: int) -> None:
    sample = Sample(iteration=3, count=13)
    tokens = 32 // ranks
    pieces = [sample.local(tokens, torch.device("cpu"), rank, ranks) for rank in range(ranks)]
    together = torch.cat([index + rank * tokens for rank, (index, _) in enumerate(pieces)])
    assert torch.equal(together, sample_positions(32, 13, 3))
    assert all(counts == tuple(len(index) for index, _ in pieces) for _, counts in pieces)


def test_only_the_first_call_counts_and_no_hook_is_left() -> None:
    module = torch.nn.Linear(2, 2)
    point = CapturePoint(module, lambda sample, args, kwargs, output: {"layer": Captured(args[0].clone())})
    probes, sample = Probes([point], []), Sample(iteration=1, count=1)
    module(torch.zeros(1, 2))
    assert not module._forward_hooks
    probes.attach(sample)
    module(torch.ones(1, 2))
    assert not module._forward_hooks
    module(torch.full((1, 2), 5.0))
    assert probes.captured["layer"].inputs.tolist() == [[1.0, 1.0]]
    probes.attach(sample)  # forward and backward are repeated
    assert not probes.captured
    module(torch.full((1, 2), 7.0))
    assert probes.captured["layer"].inputs.tolist() == [[7.0, 7.0]]
    probes.attach(sample)
    probes.detach()
    assert not module._forward_hooks
