"""``explain`` without Megatron: its options, what it prints, every warning where it must come and where it must not."""

import json
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_patch.config import Settings, WarmupConfig, WidthConfig
from megatron_patch.entry.explain import USAGE, content, explain, groups, own_options, selection, show
from megatron_patch.entry.main import started_as
from megatron_patch.entry.outlook import outlook
from megatron_patch.errors import ConfigError
from megatron_patch.theory.equilibrium import steps_to_equilibrium
from megatron_patch.theory.schedules import equilibrium_factors
from megatron_patch.theory.width import RULES, ParamSpec, multipliers
from megatron_patch.upstream.dry.coverage import Held
from megatron_patch.upstream.dry.run import DryRun
from megatron_patch.upstream.dry.schedule import Schedule

BASE_HIDDEN = 16


def scene(
    rule: str = "sqrt",
    *,
    hidden: int = 64,
    lr: float = 0.01,
    weight_decay: float = 0.1,
    min_lr: float = 0.0,
    steps: int = 20_000,
    factor: float = 1.0,
    init: str = "fan-in",
    use_mup: bool = False,
    head: int = 8,
    base_projection: float | None = None,
    assumed: bool = False,
    decays_to: float = 1.0,
    **more: Any,
) -> tuple[DryRun, Schedule]:
    """A model of one matrix, one projection, one LM head, one embedding and one gain, with a proxy 16 wide.

    Its LR goes linearly from `lr` to `decays_to` times that; the extra warmup is `factor` at every step.
    """
    args = SimpleNamespace(
        optimizer="adam",
        lr=lr, min_lr=min_lr, end_weight_decay=weight_decay, use_mup=use_mup, mup_base_hidden_size=BASE_HIDDEN,
        init_method_std=0.02, num_layers=2, kv_channels=head, v_head_dim=None, multi_latent_attention=False,
        adam_beta1=0.9, hidden_size=hidden, **more,
    )  # fmt: skip
    effective = RULES["standard" if use_mup else rule]
    found, live = [], {}
    projection = base_projection or BASE_HIDDEN
    for spec in (
        ParamSpec("decoder.layers.0.mlp.linear_fc1.weight", (4 * hidden, hidden), "matrix", hidden, BASE_HIDDEN, "h"),
        ParamSpec("decoder.layers.0.mlp.linear_fc1.bias", (4 * hidden,), "vector", 1, 1),
        ParamSpec(
            "decoder.layers.0.self_attention.linear_proj.weight", (hidden, hidden), "matrix", hidden, projection,
            "kv_projection_size",
        ),
        ParamSpec("embedding.word_embeddings.weight", (100, hidden), "embedding", hidden, BASE_HIDDEN, "h"),
        ParamSpec("output_layer.weight", (1000, hidden), "output", hidden, BASE_HIDDEN, "h"),
    ):  # fmt: skip
        factors = multipliers(effective, spec.role, spec.m)
        values = {"lr": lr * factors.lr, "weight_decay": weight_decay * factors.weight_decay}
        entry = {"name": spec.name, "class": spec.role, "shape": list(spec.shape), "fan_in": spec.fan_in}
        entry |= {"base_fan_in": spec.base_fan_in, "m": spec.m, **values, "eps": 1e-8, "optimizer": "adam"}
        found.append(Held(spec, spec.shape, False, False, assumed and spec.role == "matrix", entry))
        live[values["lr"], values["weight_decay"]] = factors
    width = WidthConfig(rule=rule, base_hidden_size=BASE_HIDDEN, init_scaling=init, megatrons_mup=use_mup)
    warmup = WarmupConfig("exp", iters=5) if factor != 1 else WarmupConfig()
    table = {
        "rule": rule,
        "exponents": [RULES[rule].lr_exponent, RULES[rule].wd_exponent],
        "base": {"hidden_size": BASE_HIDDEN},
        "source": "nowhere",
    }
    dry = DryRun(args, Settings(width, warmup), table, tuple(found), (), "rank 0 of 1", ("a note",))
    lrs = [lr * (1 + (decays_to - 1) * t / max(1, steps)) * factor for t in range(steps)]
    by_group = {
        key: (array("d", [f.lr * x for x in lrs]), array("d", [weight_decay * f.weight_decay] * steps))
        for key, f in live.items()
    }
    return dry, Schedule(
        array("q", range(steps)),
        array("d", [factor] * steps),
        array("d", lrs),
        array("d", [weight_decay] * steps),
        by_group,
        steps,
    )


def warnings(*args: Any, **kwargs: Any) -> list[str]:
    return list(outlook(*scene(*args, **kwargs)).warnings)


# --- warnings --------------------------------------------------------------------------------------------------------


def test_a_sound_configuration_has_none() -> None:
    assert warnings() == []


WARNINGS: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    (
        "--width-scaling standard: lr * weight decay goes as m^-1, 0.25 of the base model's at m = 4",
        {"rule": "standard"},
        [{"rule": "standard", "hidden": 16}, {"rule": "independent"}, {"rule": "standard", "weight_decay": 0.0}],
    ),
    ("goes as m^-0.5, 0.5 of the base model's", {"rule": "sqrt-decay"}, [{}]),
    ("--width-scaling no-decay: there is no equilibrium", {"rule": "no-decay"}, [{}, {"rule": "standard"}]),
    (
        "--use-mup alone is the rule standard",
        {"rule": "none", "use_mup": True},
        [{"rule": "none"}, {"rule": "none", "use_mup": True, "hidden": 16}, {"rule": "standard", "use_mup": True}],
    ),
    (
        "the implicit warmup of independent scaling lasts about",
        {"rule": "independent", "init": "megatron"},
        [{"init": "fan-in"}, {"rule": "independent", "hidden": 16}, {"rule": "standard"}],
    ),
    ("scaling lasts longer than the run's 100 steps", {"rule": "independent", "steps": 100}, [{"rule": "independent"}]),
    ("on top of --extra-warmup exp", {"rule": "independent", "factor": 0.5}, [{"rule": "independent"}]),
    (
        "relative update predicted at the end (step 19,899)",
        {"rule": "standard"},
        [{}, {"rule": "independent"}, {"rule": "standard", "hidden": 16}],
    ),
    (
        "T_EQ is longer than the run: matrix (m = 4) needs about",
        {"steps": 300, "init": "megatron"},
        [{"steps": 300}, {"init": "megatron"}, {"steps": 300, "init": "megatron", "rule": "no-decay"}],
    ),
    (
        "--min-lr 0.006 is above the peak LR 0.005 of matrix (m = 4)",
        {"min_lr": 0.006},
        [{"min_lr": 0.005}, {"min_lr": 0.006, "hidden": 16}],
    ),
    ("heads times head size is 16, no multiple of this model's head size 32", {"head": 32}, [{"head": 16}]),
    ("heads times head size is 12", {"base_projection": 12.0}, [{"base_projection": 24.0}]),
    ("LR at its upper edge: the update of matrix (m = 4)", {"lr": 0.2}, [{"lr": 0.1}]),
    ("LR at its upper edge: lr * weight decay reaches 1.2, and 1 wipes out", {"lr": 12.0}, [{"lr": 9.9}]),
    ("LR at its lower edge: all updates of matrix (m = 4)", {"lr": 1e-4, "steps": 1000}, [{"lr": 1e-3, "steps": 1000}]),
    (
        "2 parameters are of layers this package does not know, decoder.layers.0.mlp.linear_fc1.weight",
        {"assumed": True},
        [{}, {"assumed": True, "rule": "none"}],
    ),
]


@pytest.mark.parametrize(("text", "wrong", "right"), WARNINGS, ids=[text for text, _, _ in WARNINGS])
def test_warning(text: str, wrong: dict[str, Any], right: Sequence[dict[str, Any]]) -> None:
    """Each comes once where it should and not where it should not."""
    assert sum(text in line for line in warnings(**wrong)) == 1, warnings(**wrong)
    kind = text.partition(" of matrix")[0].partition(" about")[0]
    for sound in right:
        assert not any(kind in line for line in warnings(**sound)), sound


def test_length_of_the_implicit_warmup_is_that_of_eq_38() -> None:
    """Both models start with std 0.02, so the factor is the one of theory, from 1/m to 1."""
    dry, steps = scene("independent", init="megatron")
    factors = list(equilibrium_factors([(0.01, 0.1)] * 20_000, m=4, rho_0=0.02))
    length = 1 + max(t for t, factor in enumerate(factors) if factor < math.sqrt(0.5))
    (line,) = (line for line in outlook(dry, steps).warnings if "implicit warmup" in line)
    assert f"lasts about {length:,} of the run's 20,000 steps" in line
    assert "starts at 0.25 of" in line


def test_time_to_equilibrium_is_that_of_the_slowest_matrix() -> None:
    """The projection, with m = 2 and std 0.02 / sqrt(2 layers * 2), has a longer way from a smaller start."""
    (line,) = (line for line in warnings(base_projection=32.0, steps=300, init="megatron") if "T_EQ" in line)
    time = steps_to_equilibrium(0.01, 0.01 / math.sqrt(2), 0.1 * math.sqrt(2))
    assert time > steps_to_equilibrium(0.02, 0.005, 0.2)
    assert f"matrix (m = 2) needs about {time:,.0f} steps" in line


def test_depth_and_head_size_of_the_reference_run(tmp_path: Path) -> None:
    def told(**arguments: int) -> list[str]:
        (tmp_path / "run.json").write_text(json.dumps({"arguments": arguments}))
        return warnings(reference_run=str(tmp_path))

    assert told(num_layers=2, kv_channels=8) == []
    assert told(num_layers=4, kv_channels=8) == [
        "depth: the base model of --reference-run has 4, this one 2; the rules transfer across width alone"
    ]
    assert [line.partition(":")[0] for line in told(num_layers=2, kv_channels=16)] == ["head size"]


@pytest.mark.parametrize("text", [None, "{", "{}", "[]"])
def test_unreadable_reference_run(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^--reference-run .*: expected the metrics folder of a run"):
        warnings(reference_run=str(tmp_path))


# --- predictions and JSON --------------------------------------------------------------------------------------------


def test_relative_updates_by_hand() -> None:
    """rho_0 = 1/8; update 0.005; rho_1^2 = (1 - 0.001)^2 / 64 + 0.005^2."""
    found = outlook(*scene(steps=2))
    rho_1 = math.sqrt(0.999**2 / 64 + 0.005**2)
    assert found.relative_updates == pytest.approx([0.04, 0.005 / rho_1], rel=1e-12)
    assert "0.04 at its largest (step 1)" in found.facts[0] and "0.23 of that" in found.facts[0]


def test_extra_warmup_is_in_the_prediction_but_not_in_the_base_models() -> None:
    assert outlook(*scene(steps=2, factor=0.5)).relative_updates[0] == pytest.approx(0.02)
    (line,) = (line for line in warnings(steps=2, factor=0.5) if "predicted at the end" in line)
    assert "a ratio of 0.5" in line


def test_content_has_the_keys_of_the_interface() -> None:
    dry, steps = scene(steps=3)
    found = content(dry, None, outlook(dry, steps))
    assert list(found) == ["rule", "exponents", "base", "parameters", "groups", "warnings"]
    assert set(found["parameters"][0]) == {
        "name", "class", "shape", "fan_in", "base_fan_in", "m", "lr", "weight_decay", "eps",
        "optimizer",
    }  # fmt: skip
    names = {"class", "m", "lr", "weight_decay", "eps", "optimizer", "parameters", "numel"}
    assert set(found["groups"][0]) == names
    assert found["warnings"][-1] == "a note"
    found = json.loads(json.dumps(content(dry, steps, outlook(dry, steps))))
    assert [step["step"] for step in found["schedule"]] == [0, 1, 2]
    assert set(found["schedule"][0]) == {"step", "lr_factor", "lr", "relative_update_prediction"}
    assert found["schedule"][0]["lr"] == 0.01
    assert found["exponents"] == [0.5, 0.5]


def test_nothing_is_predicted_where_the_model_is_void() -> None:
    dry, steps = scene(lr=12.0, steps=3)
    found = content(dry, steps, outlook(dry, steps))
    assert [step["relative_update_prediction"] for step in found["schedule"]] == [None] * 3


def test_groups_count_tensors_and_weights() -> None:
    found = {(g["class"], g["m"]): (g["parameters"], g["numel"]) for g in groups(scene()[0].parameters)}
    assert found == {
        ("matrix", 4): (2, 4 * 64 * 64 + 64 * 64),
        ("vector", 1): (1, 256),
        ("embedding", 1): (1, 6400),
        ("output", 4): (1, 64_000),
    }


def test_tables_show_every_number_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    dry, steps = scene("independent", steps=100)
    show(dry, steps, outlook(dry, steps))
    shown = capsys.readouterr().out
    for text in (
        "decoder.layers.*.self_attention.linear_proj.weight",
        "fan-in 64 / 16 (kv_projection_size): lr * m^-1, wd * m^1",
        "base lr, base decay",
        "base lr, no decay",
        "Schedule (100 steps)",
        "0.0025",
        "warning: a note",
    ):
        assert text in shown, text
    assert "…" not in shown


def test_selection_of_steps() -> None:
    assert selection(range(1000), 5, 100) == [0, 100, 250, 500, 749, 999]
    assert selection(range(3), 5, 1) == [0, 1, 2]
    # Of a schedule with gaps, the steps behind the even ones: 0, 500 and 1000.
    assert selection([0, 1, 2, 4, 600, 1000], 3, 2) == [0, 2, 4, 5]


# --- the command line ------------------------------------------------------------------------------------------------


def test_own_options_may_stand_anywhere() -> None:
    options, rest = own_options(
        "--rank 3 --config a.yaml x.py --lr 1 --world-size=8 --json --init-method-std -1".split()
    )
    assert (options.rank, options.world_size, options.json, options.all_ranks) == (3, 8, True, False)
    assert rest == "--config a.yaml x.py --lr 1 --init-method-std -1".split()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--world-size 0", "--world-size 0: expected a positive integer; give the number of ranks"),
        ("--world-size x", "--world-size x: expected an integer; correct the value"),
        ("--rank", "--rank given: expected one argument; complete or correct it"),
        ("--rank 1 --all-ranks", "--rank 1: expected no --rank beside --all-ranks; drop one of the two"),
        ("no_such_script.py", "SCRIPT.py no_such_script.py: expected an existing Python file"),
        ("--config absent.yaml", "--config absent.yaml: expected a readable file"),
    ],
)
def test_mistakes_found_before_anything_is_imported(
    argv: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        explain(argv.split())
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["--help"], ["--lr", "1", "-h"]])
def test_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    explain(argv)
    assert capsys.readouterr().out == USAGE.format(started=started_as()) + "\n"
