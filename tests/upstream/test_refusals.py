"""The table of what cannot be honoured: every row refuses, in the words of tests/golden/refusals.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.errors import ConfigError
from megatron_patch.upstream.cpu.platform import cpu_arguments
from megatron_patch.upstream.flags import validate
from megatron_patch.upstream.refusals import TABLE, Feature, refused
from tests.support.flags import parser

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/refusals.json").read_text())
FINE = {
    "optimizer": "adam",
    "num_experts": None,
    "moe_token_dispatcher_type": "alltoall",
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
}


def said(feature: Feature, settings: Mapping[str, Any]) -> str:
    (error,) = refused(feature, {**FINE, **settings})
    return str(error)


@pytest.mark.parametrize(("settings", "text"), GOLDEN["width"])
def test_what_no_flag_of_ours_goes_with(settings: dict[str, Any], text: str) -> None:
    assert said(Feature.ANY, settings) == text
    assert text not in map(str, refused(Feature.METRICS, {**FINE, **settings}))


@pytest.mark.parametrize(("settings", "text"), GOLDEN["metrics"])
def test_what_metrics_do_not_go_with(settings: dict[str, Any], text: str) -> None:
    assert said(Feature.METRICS, settings) == text
    assert refused(Feature.ANY, {**FINE, **settings}) == []


@pytest.mark.parametrize(("settings", "text"), GOLDEN["rule"])
def test_what_a_rule_does_not_go_with(settings: dict[str, Any], text: str) -> None:
    assert said(Feature.RULE, settings) == text
    assert refused(Feature.ANY, {**FINE, **settings}) == []
    whole = {"tensor_model_parallel_size": 1, "expert_tensor_parallel_size": None}
    assert refused(Feature.RULE, {**FINE, **settings, **whole}) == []


@pytest.mark.parametrize(("settings", "text"), GOLDEN["engine"])
def test_what_deepspeeds_engine_does_not_go_with(settings: dict[str, Any], text: str) -> None:
    assert said(Feature.ENGINE, settings) == text


@pytest.mark.parametrize(("words", "text"), GOLDEN["cpu"])
def test_what_a_cpu_cannot_do(words: list[str], text: str | None) -> None:
    if text is None:
        cpu_arguments(words)
        return
    with pytest.raises(ConfigError) as caught:
        cpu_arguments(words)
    assert str(caught.value) == text


def test_every_row_is_among_them() -> None:
    """Whoever adds a row adds its words to the golden file; and each row can be reached."""
    met = {(Feature.ANY, name) for settings, _ in GOLDEN["width"] for name in settings}
    met |= {(Feature.METRICS, name) for settings, _ in GOLDEN["metrics"] for name in settings}
    met |= {(Feature.RULE, name) for settings, _ in GOLDEN["rule"] for name in settings}
    met |= {(Feature.METRICS, "sequence_parallel")}  # refused where it is not given
    met |= {(Feature.ENGINE, name) for settings, _ in GOLDEN["engine"] for name in settings}
    met |= {(Feature.CPU, words[0]) for words, _ in GOLDEN["cpu"]}
    assert {(row.feature, row.attribute) for row in TABLE} <= met
    assert len({(row.feature, row.attribute) for row in TABLE}) == len(TABLE)
    both = {row.attribute for row in TABLE if row.feature is Feature.ANY}
    both &= {row.attribute for row in TABLE if row.feature is Feature.METRICS}
    assert both == set(), "metrics are among our flags, so the second row would never be reached"


@pytest.mark.parametrize(
    ("words", "settings", "flag"),
    [
        ("", {"cuda_graph_impl": "local", "gtp_weight_remat_size": 2}, ""),
        ("--metrics-dir x", {"cuda_graph_impl": "local"}, ""),
        ("--metrics-dir x", {"gtp_weight_remat_size": 2}, "--tensor-parallel-num-weight-shards"),
        ("--metrics-dir x", {"use_torch_fsdp2": True}, ""),
        ("--alignment-interval 1 --metrics-dir x", {"cuda_graph_impl": "local"}, "--cuda-graph-impl"),
        ("--spectral-interval 1 --metrics-dir x", {"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
        ("--cpu", {"cuda_graph_impl": "local"}, ""),
    ],
)
def test_only_what_was_asked_for_is_checked(words: str, settings: dict[str, Any], flag: str) -> None:
    args = parser().parse_args(words.split())
    vars(args).update(FINE, **settings)
    if not flag:
        validate(args)
        return
    with pytest.raises(ConfigError, match=f"^{flag} "):
        validate(args)
