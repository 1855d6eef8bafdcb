"""Sweep files: what they mean, and every mistake in one line."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.errors import ConfigError
from megatron_patch.files.yaml_flags import load_yaml
from megatron_patch.sweep.axes import plan, powers_of_two, read_axes, safe_name
from megatron_patch.sweep.file import Range, Search, SweepFile, TwoPhase, read_sweep

CONFIGS = Path(__file__).parents[2] / "configs"
BASE = "hidden-size: 32\nlr: 0.01\nseed: 1\nswiglu: true\nmetrics-dir: elsewhere\n"
GRID = {"lr": {"log2": [-9, -7]}}


def sweep(folder: Path, base: str = BASE, **content: Any) -> SweepFile:
    """Read a sweep file with these entries on top of a grid of three LRs; None drops an entry."""
    (folder / "base.yaml").write_text(base)
    entries = {"config": "base.yaml", "output": str(folder / "out"), "grid": GRID, **content}
    entries = {key.replace("_", "-"): value for key, value in entries.items() if value is not None}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(entries, sort_keys=False))
    return read_sweep(str(path))


def names(file: SweepFile) -> list[str]:
    """The names of the trials of a grid."""
    assert isinstance(file.plan, tuple)
    return [trial.name for trial in file.plan]


# --- axes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ({"log2": [-9, -7]}, [2**-9, 2**-8, 2**-7]),
        ({"log2": [-1, 0], "step": 0.5}, [0.5, math.sqrt(0.5), 1.0]),
        ({"log2": [-8, -4], "step": 2}, [2**-8, 2**-6, 2**-4]),
        ({"log2": [5, 7]}, [32, 64, 128]),
        ({"log2": [-3, -3]}, [0.125]),
    ],
)
def test_powers_of_two(axis: dict[str, Any], values: list[float]) -> None:
    found = powers_of_two("x", axis)
    assert found == pytest.approx(values, rel=1e-15)
    assert [type(value) for value in found] == [type(value) for value in values]


@given(st.integers(-60, 60), st.integers(0, 40), st.sampled_from([0.125, 0.25, 0.5, 1, 2, 3]))
def test_powers_of_two_keep_their_ratio(low: int, steps: int, step: float) -> None:
    found = powers_of_two("x", {"log2": [low, low + steps * step], "step": step})
    assert len(found) == steps + 1
    assert found[0] == 2.0**low
    assert all(b / a == pytest.approx(2**step, rel=1e-12) for a, b in itertools.pairwise(found))


SCALARS = st.one_of(st.integers(-99, 99), st.floats(0.5, 1000, width=16), st.sampled_from(["a b", "../x", "", "ä"]))
AXES = st.dictionaries(
    st.sampled_from(["lr", "seed", "weight-decay", "width", "hidden_size"]),
    st.lists(SCALARS, min_size=1, max_size=4, unique_by=lambda value: value),  # 2 and 2.0 are one point
    min_size=1,
)


@given(AXES)
def test_a_grid_is_the_product_of_its_axes(content: dict[str, list[Any]]) -> None:
    trials = plan("grid", [read_axes("grid", content)]) if len({safe_name(str(content))}) else ()
    keys = [key.replace("_", "-") for key in content]
    expected = [dict(zip(keys, values, strict=True)) for values in itertools.product(*content.values())]
    assert [dict(trial.changes) for trial in trials] == expected
    assert len({trial.name for trial in trials}) == len(trials)
    assert all(re.fullmatch(r"[A-Za-z0-9_=+-][A-Za-z0-9._=+-]*", trial.name) for trial in trials)


@given(st.text(max_size=300))
def test_no_name_leads_out_of_the_folder(text: str) -> None:
    assert Path("/o/trials", safe_name("x=" + text)).resolve().parent == Path("/o/trials")


def test_bundles_go_together_and_lend_their_first_value(tmp_path: Path) -> None:
    file = sweep(
        tmp_path,
        grid={
            "width": [{"hidden-size": 32, "num-attention-heads": 1}, {"hidden_size": 64, "num-attention-heads": 2}],
            "rule": [{"width-scaling": "none", "base-hidden-size": None}, {"width-scaling": "sqrt"}],
            "lr": [0.5, "1e-3"],
        },
    )
    assert isinstance(file.plan, tuple)
    assert names(file)[:4] == [
        "width=32_rule=none_lr=0.5",
        "width=32_rule=none_lr=1e-3",
        "width=32_rule=sqrt_lr=0.5",
        "width=32_rule=sqrt_lr=1e-3",
    ]
    assert dict(file.plan[-1].changes) == {
        "hidden-size": 64,
        "num-attention-heads": 2,
        "width-scaling": "sqrt",
        "lr": "1e-3",
    }


def test_a_name_does_not_depend_on_the_other_points(tmp_path: Path) -> None:
    """Else a sweep that grows would train again what it has."""
    few, many = {"lr": [0.5], "seed": [1]}, {"lr": [0.25, 0.5, 1], "seed": [1, 2]}
    assert set(names(sweep(tmp_path, grid=few))) < set(names(sweep(tmp_path, grid=many)))


def test_grids_may_overlap(tmp_path: Path) -> None:
    assert names(sweep(tmp_path, grid=[{"lr": [1, 2]}, {"lr": [2, 3]}])) == ["lr=1", "lr=2", "lr=3"]


# --- the config of a trial -------------------------------------------------------------------------------------------


def test_config_of_a_trial_is_complete(tmp_path: Path) -> None:
    file = sweep(tmp_path, set={"seed": 7, "swiglu": None, "save": "{folder}/checkpoints"}, grid={"lr": [2**-20]})
    (trial,) = file.plan
    folder = f"{tmp_path}/out/trials/lr=9.536743164e-07"
    path = tmp_path / "config.yaml"
    path.write_text(file.config_text(trial))
    assert load_yaml(str(path)) == {
        "hidden-size": 32,
        "lr": 2**-20,
        "seed": 7,
        "save": f"{folder}/checkpoints",
        "metrics-dir": f"{folder}/transfer",
        "tensorboard-dir": f"{folder}/tensorboard",
    }


def test_null_leaves_a_flag_out(tmp_path: Path) -> None:
    file = sweep(tmp_path, grid={"seed": [None, 3]})
    assert isinstance(file.plan, tuple)
    assert "seed" not in file.trial_flags(file.plan[0], "x")
    assert file.trial_flags(file.plan[1], "x")["seed"] == 3


def test_placeholders_in_the_values_of_flags(tmp_path: Path) -> None:
    """Not only in commands: five runs in W&B would all be called {name}."""
    flags = {"wandb-exp-name": "{sweep}/{name}", "data-args-path": ["{config}", "x{folder}"], "seed": 7}
    odd = {"alignment-layers": r"layers\.\d{1,2}", "wandb-project": "${USER}{{name}}", "title": '{"q": 1}'}
    file = sweep(tmp_path, set=flags | odd, grid={"lr": [0.5], "save": ["/ckpt/{name}"]})
    (trial,) = file.plan if isinstance(file.plan, tuple) else ()
    folder = file.folder(trial)
    found = file.trial_flags(trial, folder)
    assert trial.name == "lr=0.5_save=-ckpt-name-"
    assert found["wandb-exp-name"] == f"sweep/{trial.name}"
    assert found["data-args-path"] == [f"{folder}/config.yaml", f"x{folder}"]
    assert found["save"] == f"/ckpt/{trial.name}"
    assert {name: found[name] for name in odd} == odd | {"wandb-project": "${USER}{name}"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"set": {"wandb-exp-name": "{nmae}"}},
            r"set.wandb-exp-name \{nmae\}: expected one .*; did you mean \{name\}",
        ),
        ({"set": {"x": ["{name}", "a{Folder}"]}}, r"set.x \{Folder\}: expected one of"),
        ({"set": {"x": "{lr}"}}, r"set.x \{lr\}: expected one of .*; write \{\{lr\}\} for the text \{lr\}"),
        ({"set": {"x": "{port}"}}, r"set.x \{port\}: expected one of .*, which is known only when a command starts"),
        ({"grid": {"x": ["{nmae}"]}}, r"grid.x.x \{nmae\}: expected one of"),
        ({"grid": {"w": [{"lr": 1, "x": "{n_x}"}]}}, r"grid.w.x \{n_x\}: expected one of"),
    ],
)
def test_unknown_placeholders_in_flags(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(tmp_path, **content)


def test_unknown_placeholders_in_the_base_config(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text('lr: 0.1\nwandb-exp-name: "{nmae}"\n')
    (tmp_path / "sweep.yaml").write_text("config: base.yaml\noutput: o\ngrid: {lr: [1]}\n")
    with pytest.raises(ConfigError, match=r"base.yaml: wandb-exp-name \{nmae\}"):
        read_sweep(str(tmp_path / "sweep.yaml"))


def test_placeholders(tmp_path: Path) -> None:
    command = ["srun", "--job-name={sweep}-{name}", "bash", "-c", "echo ${x} {config}", "{worker}"]
    file = sweep(tmp_path, command=command, environment={"GPU": "{worker}", "N": 1}, grid={"lr": [1]})
    (trial,) = file.plan
    values = {"worker": "3", "port": "1", "python": "py"}
    folder = f"{tmp_path}/out/trials/lr=1"
    assert file.words(trial, values) == [
        "srun",
        "--job-name=sweep-lr=1",
        "bash",
        "-c",
        f"echo ${{x}} {folder}/config.yaml",
        "3",
    ]
    assert file.variables(trial, values) == {"GPU": "3", "N": "1"}


def test_difference(tmp_path: Path) -> None:
    """What was trained is compared with what would be trained; where it lies does not matter."""
    file = sweep(tmp_path, set={"save": "{folder}/checkpoints"})
    assert isinstance(file.plan, tuple)
    trial = file.plan[0]
    folder = Path(file.folder(trial))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(file.config_text(trial))
    assert file.difference(trial) is None
    (tmp_path / "out").rename(tmp_path / "moved")
    assert (
        sweep(tmp_path, set={"save": "{folder}/checkpoints"}, output=str(tmp_path / "moved")).difference(trial) is None
    )
    for change, expected in (
        ({"seed": 2}, ("seed", 1, 2)),
        ({"seed": None}, ("seed", 1, None)),
        ({"bf16": True}, ("bf16", None, True)),
    ):
        changed = sweep(tmp_path, set={"save": "{folder}/c", **change}, output=str(tmp_path / "moved"))
        assert changed.difference(trial) == expected


# --- the other two plans ---------------------------------------------------------------------------------------------


def test_two_phases(tmp_path: Path) -> None:
    phases = {"phase-1": {"lr": {"log2": [-9, -7]}, "seed": [1, 2]}, "phase-2": {"rule": ["a", "b"], "lr": [1, 2]}}
    file = sweep(tmp_path, grid=None, two_phase=phases)
    assert isinstance(file.plan, TwoPhase)
    assert len(file.plan.first) == 6
    assert file.plan.second[0].name == "phase2_rule=a_lr=1"


def test_space_of_a_sampler(tmp_path: Path) -> None:
    space = {
        "lr": {"log": ["1e-4", 1]},
        "layers": {"integer": [1, 4]},
        "width": [{"hidden-size": 8}, {"hidden-size": 16}],
    }
    file = sweep(tmp_path, grid=None, optuna={"trials": 5, "seed": 0, "space": space, "pruner": "median"})
    assert isinstance(file.plan, Search)
    assert (file.plan.sampler, file.plan.trials, file.plan.seed, file.plan.pruner) == ("tpe", 5, 0, "median")
    lr, layers, width = file.plan.space
    assert (lr, layers) == (Range("lr", "log", 1e-4, 1.0), Range("layers", "integer", 1.0, 4.0))
    assert not isinstance(width, Range)
    assert [point.label for point in width.points] == ["8", "16"]


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"girds": 1}, "girds : expected one of the keys config, output,.*; did you mean grid?"),
        ({"grid": None}, "sweep.yaml not given: expected exactly one of grid, two-phase, optuna"),
        ({"optuna": {}}, "sweep.yaml grid and optuna: expected exactly one of"),
        ({"output": None}, "output not given: expected a text; add `output:`"),
        ({"config": "absent.yaml"}, "config .*absent.yaml: expected a readable file"),
        ({"grid": {}}, "grid {}: expected a mapping of axes"),
        ({"grid": []}, "grid .*: expected at least one grid"),
        ({"grid": {"lr": 1}}, "grid.lr 1: expected a list of values, or {log2"),
        ({"grid": {"lr": []}}, "grid.lr .*: expected a list of values"),
        ({"grid": {"lr": [[1]]}}, r"grid.lr \[1\]: expected one value; for a flag that takes several write `- {lr"),
        ({"grid": {"lr": [1, {"lr": 2}]}}, "values, or mappings of flags, but not both"),
        ({"grid": {"lr": [1, 1]}}, "grid.lr 1: expected points that differ in their first flag"),
        ({"grid": {"w": [{"a": 1, "b": 1}, {"a": 1, "b": 2}]}}, "grid.w 1: expected points that differ"),
        ({"grid": {"w": [{}]}}, "grid.w {}: expected at least one flag"),
        ({"grid": {"w": [{"a": {"b": 1}}]}}, "grid.w.a .*: expected a value or a list"),
        ({"grid": {"lr": [1], "w": [{"lr": 2}]}}, "grid lr: expected each flag in one axis, and lr has it"),
        ({"grid": [{"w": [{"a": 1}]}, {"w": [{"a": 1, "b": 2}]}]}, "grid w=1: expected one name for one trial"),
        ({"grid": {"lr": {"log2": [-4, -9]}}}, r"grid.lr.log2 \[-4, -9\]: expected the lower one first"),
        ({"grid": {"lr": {"log2": [-4]}}}, r"grid.lr.log2 \[-4\]: expected \[low, high\]"),
        ({"grid": {"lr": {"log2": [-4, "x"]}}}, "grid.lr.log2 x: expected a number"),
        ({"grid": {"lr": {"log2": [-4, -1], "step": 2}}}, "grid.lr .*: expected steps that lead from -4 to -1"),
        ({"grid": {"lr": {"log2": [-4, -1], "step": 0}}}, "grid.lr .*: expected .* a step above 0.001"),
        ({"grid": {"lr": {"log10": [-4, -1]}}}, "grid.lr .*: expected a list of values, or {log2"),
        ({"grid": {"a b": [1]}}, "grid a b: expected the name of a flag"),
        ({"grid": {"metrics_dir": ["/etc"]}}, "grid metrics-dir: expected another flag: the sweep gives"),
        ({"set": {"tensorboard-dir": "/etc"}}, "set tensorboard-dir: expected another flag"),
        (
            {"set": {"save": "/etc"}},
            'set.save /etc: expected a folder of each trial\'s own; write "{folder}/checkpoints"',
        ),
        ({"grid": {"save": ["a", "b"]}}, "grid.lr|grid.save.save a: expected a folder of each trial's own"),
        ({"set": {"a": {"b": 1}}}, "set.a .*: expected a value or a list"),
        ({"set": [1]}, "set .*: expected a mapping"),
        ({"command": "python"}, "command python: expected a list of words"),
        ({"command": ["python"]}, "command .*: expected a word with {config}"),
        (
            {"command": ["python", "{confg}"]},
            r"command \{confg\}: expected one of {config}, .*; did you mean {config}?",
        ),
        ({"environment": {"A B": 1}}, "environment A B: expected the name of a variable"),
        ({"environment": {"A": True}}, "environment.A True: expected a text or a number; quote it"),
        ({"wait": "forever"}, "wait forever: expected one of command, run.json"),
        ({"timeout": 3}, "timeout 3: expected `wait: run.json` beside it"),
        ({"wait": "run.json", "timeout": -3}, "timeout -3.0: expected seconds above 0"),
        ({"grid": None, "two-phase": {"phase-1": GRID}}, "phase-2 not given: expected a mapping of axes"),
        (
            {"grid": None, "two-phase": {"phase-1": {"lr": [1], "seed": [1]}, "phase-2": {"seed": [1]}}},
            "phase-2 not given: expected an axis lr in each grid",
        ),
        (
            {"grid": None, "two-phase": {"phase-1": {"lr": [1, 2], "w": [1, 2]}, "phase-2": GRID}},
            "phase-1 w: expected only lr and seed with several values",
        ),
        (
            {"grid": None, "two-phase": {"phase-1": GRID, "phase-2": {**GRID, "vector-lr": [1]}}},
            "vector-lr: expected other flags; drop it",
        ),
        ({"grid": None, "optuna": {"trials": 3}}, "space not given: expected a mapping"),
        ({"grid": None, "optuna": {"trials": 0, "space": {"lr": [1]}}}, "trials 0: expected an integer >= 1"),
        ({"grid": None, "optuna": {"trials": 1, "space": {"lr": {"log": [0, 1]}}}}, "expected bounds above 0"),
        (
            {"grid": None, "optuna": {"trials": 1, "space": {"lr": {"lg": [0, 1]}}}},
            "expected one of log, uniform, integer",
        ),
        ({"grid": None, "optuna": {"trials": 1, "space": {"n": {"integer": [0.5, 1]}}}}, "expected whole numbers"),
        (
            {"grid": None, "optuna": {"trials": 1, "sampler": "best", "space": {"lr": [1]}}},
            "sampler best: expected one of",
        ),
    ],
    ids=str,
)
def test_mistakes_are_one_line(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(tmp_path, **content)
    shown = str(caught.value)
    assert "\n" not in shown
    assert re.search(message.replace("?", r"\?").replace("{", r"\{").replace(r"\\{", r"\{"), shown), shown


@pytest.mark.parametrize(
    "text", ["grid: {lr: [1], lr: [2]}", "grid:\n  - lr: [1]\n    lr: [2]", "output: a\noutput: b"]
)
def test_a_key_twice_is_refused(tmp_path: Path, text: str) -> None:
    """PyYAML keeps the last one without a word."""
    (tmp_path / "s.yaml").write_text(f"config: b.yaml\n{text}\n")
    with pytest.raises(ConfigError, match=r"expected each key once, and line \d has it; delete one"):
        read_sweep(str(tmp_path / "s.yaml"))


def test_aliases_cost_nothing(tmp_path: Path) -> None:
    """A file of a few hundred bytes that stands for 10^12 nodes is refused at once, not walked through."""
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 13)]
    (tmp_path / "s.yaml").write_text("\n".join(["a0: &a0 [1]", *levels]))
    with pytest.raises(ConfigError, match="did you mean"):
        read_sweep(str(tmp_path / "s.yaml"))


DOCUMENTED = re.findall(r"```yaml\n(.*?)```", (CONFIGS.parent / "docs" / "sweep.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("text", DOCUMENTED)
def test_what_the_documentation_shows(tmp_path: Path, text: str) -> None:
    content = {key.replace("-", "_"): value for key, value in yaml.safe_load(text).items() if key != "config"}
    if {"optuna", "two_phase"} & set(content):
        content["grid"] = None
    sweep(tmp_path, **content)


@pytest.mark.parametrize("name", ["sweep_example", "sweep_example_quick"])
def test_the_examples(name: str) -> None:
    """They are what their headers say, and differ from the base config in what they name only."""
    file = read_sweep(str(CONFIGS / f"{name}.yaml"))
    assert isinstance(file.plan, tuple)
    assert len(file.plan) == {"sweep_example": 54, "sweep_example_quick": 6}[name]
    for trial in file.plan:
        flags = file.trial_flags(trial, "x")
        width = flags["hidden-size"]
        assert (flags["num-attention-heads"], flags["ffn-hidden-size"]) == (width // 32, 3 * width)
        assert flags["seed"] in (1, 2, 3)
        assert (flags["width-scaling"] == "none") == ("base-hidden-size" not in flags)
