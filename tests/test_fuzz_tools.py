"""Whatever stands in a sweep file or in a target's config: read, or refused in one line, with nothing written."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch.errors import ConfigError
from megatron_patch.files.yaml_flags import load_yaml
from megatron_patch.fit.found import NoOptimum
from megatron_patch.runs.trial import Trial, to_csv
from megatron_patch.sweep.file import read_sweep
from megatron_patch.transfer.convert import convert
from megatron_patch.transfer.options import Options
from tests.support.pool import ROOT

quick = settings(max_examples=80, deadline=None)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10**6)
    | st.floats()
    | st.sampled_from(["", "{config}", "{folder}/x", "{nonsense}", "../..", "/etc/passwd", "1e-3", "tpe", "lr"])
    | st.text(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["log2", "step", "log", "uniform", "integer", "lr", "seed"]) | scalars, inner)
    ),
    max_leaves=8,
)
SWEEP_KEYS = ["config", "output", "set", "command", "environment", "grid", "optuna", "two-phase", "wait", "timeout"]
TARGET = (ROOT / "configs" / "example_target_w256.yaml").read_text()


def refused_in_one_line(error: Exception) -> None:
    assert str(error)
    assert "\n" not in str(error)


@quick
@given(content=st.dictionaries(st.sampled_from(SWEEP_KEYS), values, max_size=3), dropped=st.sampled_from(SWEEP_KEYS))
def test_any_sweep_file(tmp_path: Path, content: dict[str, Any], dropped: str) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("hidden-size: 32\nlr: 0.01\n")
    sound = {"config": str(base), "output": str(tmp_path / "out"), "grid": {"lr": {"log2": [-8, -6]}}}
    sound.pop(dropped, None)
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sound | content, allow_unicode=True))
    try:
        read = read_sweep(str(file))
    except ConfigError as error:
        refused_in_one_line(error)
    else:
        if isinstance(read.plan, tuple):
            for trial in read.plan:
                assert Path(read.folder(trial)).parent == Path(read.output) / "trials"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.yaml", "sweep.yaml"]


@quick
@given(text=st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("latin-1")))
def test_any_text_as_a_sweep_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text, errors="replace")
    with pytest.raises(ConfigError) as refused:
        read_sweep(str(file))
    refused_in_one_line(refused.value)


@quick
@given(
    flag=st.sampled_from(
        "hidden-size num-layers lr weight-decay width-scaling base-hidden-size ffn-hidden-size vector-lr kv-channels "
        "num-attention-heads global-batch-size train-iters extra-warmup lr-decay-iters seq-length".split()
    ),
    value=scalars,
    force=st.booleans(),
    exponents=st.lists(st.integers(-12, 0), max_size=7),
)
def test_any_value_in_a_target(tmp_path: Path, flag: str, value: Any, force: bool, exponents: list[int]) -> None:
    """Written, refused, or wrong in one line; what is written is a sound file that keeps the other lines."""
    losses = [Trial(32, 2.0**e, 3 + 0.05 * (e + 6.3) ** 2, 1.0, "none") for e in exponents]
    sweep, target, output = tmp_path / "sweep.csv", tmp_path / "target.yaml", tmp_path / "out.yaml"
    sweep.write_text(to_csv(losses))
    lines = [line for line in TARGET.splitlines() if not line.startswith(f"{flag}:")]
    target.write_text("\n".join([*lines, yaml.safe_dump({flag: value}).strip()]) + "\n")
    output.unlink(missing_ok=True)
    try:
        convert(str(sweep), str(target), str(output), Options(force=force), proxy=None, as_json=True)
    except (ConfigError, NoOptimum) as error:
        refused_in_one_line(error)
        assert not output.exists()
    else:
        written = load_yaml(str(output))
        assert 2.0 ** min(exponents) * (1 - 1e-5) <= written["lr"] <= 2.0 ** max(exponents) * (1 + 1e-5)
        kept = output.read_text().splitlines()
        changed = [line for line in target.read_text().splitlines() if line not in kept]
        assert all(line.partition(":")[0] in written for line in changed)
    assert {p.name for p in tmp_path.iterdir()} <= {"sweep.csv", "target.yaml", "out.yaml"}
