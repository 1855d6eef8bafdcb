"""Lines read back: what an older version wrote is read, and what nobody needs cannot make a file unreadable."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.errors import ConfigError
from megatron_patch.files.lines import AlignmentLine, CheckLine, EquilibriumLine, SublayerLine, keys, read_lines

NEEDED: dict[type[Any], dict[str, Any]] = {
    AlignmentLine: {
        "iteration": 2,
        "layer": "x",
        "kind": "row",
        "fan_in": 4,
        "fan_out": 9,
        "m": 2.0,
        "lr": 0.1,
        "weight_decay": 0.5,
        "tokens": 7,
        "weight_norm": 6.0,
        "update_norm": None,
        "relative_update": None,
        "weight_alignment": 0.3,
        "update_alignment": None,
        "alignment_ratio": None,
        "relative_representation_change": None,
        "top_singular_value": None,
    },
    EquilibriumLine: {
        "iteration": 2,
        "layer": "x",
        "weight_rms": 1.0,
        "predicted_weight_rms": None,
        "relative_update": 0.1,
        "predicted_relative_update": 0.2,
        "equilibrium_relative_update": 0.3,
    },
    SublayerLine: {"iteration": 2, "layer": "x", "gain": 0.5},
    CheckLine: {"iteration": 2, "layer": "x", "quantity": "relative_update", "ratio": 1.5},
}
"""What every file ever written has in a line, and what its readers use."""


def written(path: Path, line: dict[str, Any]) -> str:
    path.write_text(json.dumps(line) + "\n")
    return str(path)


@pytest.mark.parametrize("line_type", NEEDED)
def test_a_line_is_read_without_the_keys_that_nothing_needs(tmp_path: Path, line_type: type[Any]) -> None:
    (line,) = read_lines(written(tmp_path / "x.jsonl", NEEDED[line_type]), line_type, [])
    values = {field.name: getattr(line, field.name) for field in fields(line_type)}
    assert values == dict.fromkeys(keys(line_type)) | NEEDED[line_type]


@pytest.mark.parametrize("line_type", NEEDED)
def test_what_nothing_needs_may_be_anything(tmp_path: Path, line_type: type[Any]) -> None:
    unneeded: dict[str, Any] = {key: ["?"] for key in {*keys(line_type), "unknown"} - set(NEEDED[line_type])}
    (line,) = read_lines(written(tmp_path / "x.jsonl", NEEDED[line_type] | unneeded), line_type, [])
    assert line == line_type(**NEEDED[line_type])


@pytest.mark.parametrize(("line_type", "key"), [(t, key) for t, needed in NEEDED.items() for key in needed])
def test_what_is_needed_must_be_there_and_of_its_type(tmp_path: Path, line_type: type[Any], key: str) -> None:
    needed = NEEDED[line_type]
    for damaged in ({k: v for k, v in needed.items() if k != key}, needed | {key: ["?"]}):
        with pytest.raises(ConfigError, match=rf"x\.jsonl line 1 \((no '{key}'|{key} is \['\?'\])\)"):
            read_lines(written(tmp_path / "x.jsonl", damaged), line_type, [])
