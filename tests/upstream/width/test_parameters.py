"""Names and fan-ins of layers that other tests do not build."""

import pytest

from megatron_patch.upstream.width.parameters import spec_of

DIMENSIONS = {"hidden_size": 64, "mamba_inner_size": 128}
BASES = {"hidden_size": 16.0, "mamba_inner_size": 32.0}


@pytest.mark.parametrize(
    ("name", "shape", "fan_in", "m"),
    [
        ("mixer.in_proj.weight", (296, 64), 64, 4.0),
        ("mixer.out_proj.weight", (64, 128), 128, 4.0),
        ("mixer.conv1d_weight", (160, 1, 4), 4, 1.0),  # 0.19
        ("mixer.conv1d.weight", (160, 1, 4), 4, 1.0),  # 0.17, 0.18
    ],
)
def test_matrices_of_a_mamba_layer(name: str, shape: tuple[int, ...], fan_in: int, m: float) -> None:
    """The convolution over time reads 4 values per channel at any width: it is not scaled."""
    spec, assumed = spec_of(f"decoder.layers.0.{name}", shape, "matrix", DIMENSIONS, BASES)
    assert (spec.fan_in, spec.m, assumed) == (fan_in, m, False)
