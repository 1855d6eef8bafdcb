"""The flags of the group "width transfer": their names, what contradicts what, and what a user is told then."""

import argparse
import ast
import inspect
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch import config, errors
from megatron_patch.config import BASE_DIMENSIONS, Settings, WarmupConfig, WidthConfig, options
from megatron_patch.config import metrics as config_metrics
from megatron_patch.config import warmup as config_warmup
from megatron_patch.config import width as config_width
from megatron_patch.errors import ConfigError, ConfigErrors
from megatron_patch.theory.width import ROLES, RULES, Rule, multipliers
from megatron_patch.upstream import flags, refusals
from tests.support.flags import parser
from tests.support.pool import Pool

# The table of the interface, which is fixed: a new flag is a decision, to be made there first.
FLAGS = {
    "--width-scaling",
    "--base-hidden-size",
    "--base-ffn-hidden-size",
    "--base-kv-projection-size",
    "--base-moe-ffn-hidden-size",
    "--base-moe-shared-expert-intermediate-size",
    "--base-moe-latent-size",
    "--base-q-lora-rank",
    "--base-kv-lora-rank",
    "--base-mamba-inner-size",
    "--base-linear-attention-inner-size",
    "--lr-width-exponent",
    "--wd-width-exponent",
    "--vector-lr",
    "--embedding-weight-decay",
    "--no-scale-output-layer",
    "--scale-adam-eps",
    "--init-scaling",
    "--extra-warmup",
    "--extra-warmup-iters",
    "--extra-warmup-fraction",
    "--extra-warmup-scope",
    "--alignment-interval",
    "--alignment-tokens",
    "--alignment-layers",
    "--spectral-interval",
    "--metrics-dir",
    "--no-report",
    "--override-width-scaling",
    "--cpu",
    "--reference-run",
    "--reference-factor",
    "--reference-count",
    "--allow-untested-megatron",
    "--allow-rank-differences",
    "--deepspeed",
    "--deepspeed-config",
    "--audit-interval",
}

SQRT = "--width-scaling sqrt --base-hidden-size 32"
CUSTOM = "--width-scaling custom --base-hidden-size 32"


def namespace(argv: str | list[str], **megatron: Any) -> argparse.Namespace:
    """What our flags give, with the attributes of Megatron's own that are read beside them."""
    arguments = parser().parse_args(argv.split() if isinstance(argv, str) else argv)
    for name, value in {"optimizer": "adam", "lr": 1e-2, **megatron}.items():
        setattr(arguments, name, value)
    return arguments


# --- names -----------------------------------------------------------------------------------------------------------


def test_no_new_flags() -> None:
    added = {option for action in parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert added == FLAGS


def test_the_parser_says_what_it_has_always_said() -> None:
    """Names, order, types, defaults, choices and help, frozen when they were still written out one by one."""
    frozen = json.loads((Path(__file__).parent / "golden/flags.json").read_text())
    group = parser()._action_groups[-1]
    found = [
        {
            "flag": list(action.option_strings),
            "dest": action.dest,
            "action": type(action).__name__,
            "nargs": action.nargs,
            "type": getattr(action.type or str, "__name__", ""),
            "default": action.default,
            "choices": None if action.choices is None else list(action.choices),
            "metavar": action.metavar,
            "help": action.help,
        }
        for action in group._group_actions
    ]
    assert group.title == frozen["title"]
    assert found == frozen["flags"]


def test_every_other_fan_in_has_a_base_flag() -> None:
    assert {config.flag(f"base_{name}") for name in BASE_DIMENSIONS} == {
        flag for flag in FLAGS if flag.startswith("--base-")
    } - {"--base-hidden-size"}


def test_every_flag_is_explained() -> None:
    for action in parser()._actions:
        assert action.help, action.option_strings


def config_fields() -> dict[str, list[str]]:
    """In a worker: the fields of every dataclass of Megatron's that is called a config, and Megatron's own flags."""
    import dataclasses

    from megatron.training import arguments

    found: dict[str, list[str]] = {}
    for module in [m for name, m in list(sys.modules.items()) if name.startswith("megatron.") and m is not None]:
        for name, value in vars(module).items():
            if inspect.isclass(value) and dataclasses.is_dataclass(value) and re.search("Config|Args", name):
                found[name] = [field.name for field in dataclasses.fields(value)]
    megatrons = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    found["flags"] = [action.dest for action in megatrons._actions]
    return found


def test_no_flag_has_the_name_of_a_megatron_setting(pool: Pool) -> None:
    """Megatron copies every attribute of the namespace that is called like a field into its config objects."""
    (fields,) = pool.run(config_fields, distributed=False)
    known = {
        "TransformerConfig",
        "MLATransformerConfig",
        "ModelParallelConfig",
        "OptimizerConfig",
        "DistributedDataParallelConfig",
        "SchedulerConfig",
        "TrainingConfig",
        "ValidationConfig",
        "CheckpointConfig",
        "LoggerConfig",
        "TokenizerConfig",
        "RNGConfig",
        "ProfilingConfig",
        "DistributedInitConfig",
        "RerunStateMachineConfig",
        "StragglerDetectionConfig",
        "GPTModelConfig",
    }
    assert known <= set(fields), "Megatron's configs are elsewhere now: this test looks past them"
    assert "num_layers" in fields["TransformerConfig"]
    assert "hidden_size" in fields["flags"]
    ours = {action.dest for action in parser()._actions} - {"help"}
    clashes = {name: sorted(ours & set(names)) for name, names in fields.items() if ours & set(names)}
    assert clashes == {}


def test_megatron_reads_no_attribute_called_like_a_flag_of_ours() -> None:
    import importlib.util

    (root,) = importlib.util.find_spec("megatron").submodule_search_locations or ()  # type: ignore[union-attr]
    ours = {action.dest for action in parser()._actions} - {"help"}
    pattern = re.compile(rf"\bargs\.({'|'.join(sorted(ours))})\b|\bargs, ['\"]({'|'.join(sorted(ours))})['\"]")
    texts = {path: path.read_text(errors="replace") for path in Path(root).rglob("*.py")}
    assert len(texts) > 300, "this is not the whole of Megatron"
    assert {str(path): match[0] for path, text in texts.items() if (match := pattern.search(text))} == {}


# --- refusals --------------------------------------------------------------------------------------------------------

# (our flags, Megatron's attributes, how the message begins, what it goes on with, the fix)
CASES: list[tuple[str, dict[str, Any], str, str, str]] = [
    (
        "--width-scaling sqrt",
        {},
        "--base-hidden-size not given",
        "which --width-scaling sqrt needs",
        "give the hidden size",
    ),
    (
        "--width-scaling none --base-hidden-size 0",
        {},
        "--base-hidden-size 0",
        "a positive integer",
        "give the proxy's size",
    ),
    (f"{SQRT} --base-q-lora-rank -3", {}, "--base-q-lora-rank -3", "a positive integer", "give the proxy's size"),
    ("--base-hidden-size 32", {}, "--base-hidden-size 32", "a width rule", "add --width-scaling"),
    ("--base-ffn-hidden-size 32", {}, "--base-ffn-hidden-size 32", "a width rule", "add --width-scaling"),
    (CUSTOM, {}, "--lr-width-exponent not given", "a number with --width-scaling custom", "give the exponent"),
    (
        f"{CUSTOM} --lr-width-exponent 1",
        {},
        "--wd-width-exponent not given",
        "a number with --width-scaling custom",
        "give the exponent",
    ),
    (
        f"{SQRT} --lr-width-exponent 0.5",
        {},
        "--lr-width-exponent 0.5",
        "--width-scaling sqrt fixes it",
        "use --width-scaling custom",
    ),
    (
        "--wd-width-exponent 1",
        {},
        "--wd-width-exponent 1.0",
        "--width-scaling none fixes it",
        "use --width-scaling custom",
    ),
    (
        f"{CUSTOM} --lr-width-exponent 4.1 --wd-width-exponent 1",
        {},
        "--lr-width-exponent 4.1",
        "between -4 and 4",
        "check",
    ),
    (
        f"{CUSTOM} --lr-width-exponent 1 --wd-width-exponent nan",
        {},
        "--wd-width-exponent nan",
        "between -4 and 4",
        "check",
    ),
    ("--vector-lr -1", {}, "--vector-lr -1.0", "a finite number >= 0", "correct the value"),
    ("--vector-lr nan", {}, "--vector-lr nan", "a finite number >= 0", "correct the value"),
    ("--embedding-weight-decay inf", {}, "--embedding-weight-decay inf", "a finite number >= 0", "correct the value"),
    ("--no-scale-output-layer", {}, "--no-scale-output-layer given", "a width rule", "add --width-scaling or drop"),
    ("--scale-adam-eps", {}, "--scale-adam-eps given", "a width rule", "add --width-scaling or drop"),
    (
        f"{SQRT} --extra-warmup exp",
        {},
        "--extra-warmup-iters/--extra-warmup-fraction not given",
        "exactly one of the two",
        "give the length of the warmup once",
    ),
    (
        f"{SQRT} --extra-warmup exp --extra-warmup-iters 5 --extra-warmup-fraction 0.5",
        {},
        "--extra-warmup-iters/--extra-warmup-fraction --extra-warmup-iters 5 and --extra-warmup-fraction 0.5",
        "exactly one of the two",
        "give the length of the warmup once",
    ),
    (
        f"{SQRT} --extra-warmup decay-away --extra-warmup-iters 5",
        {},
        "--extra-warmup-iters 5",
        "--extra-warmup exp",
        "or drop this flag",
    ),
    (
        f"{SQRT} --extra-warmup exp --extra-warmup-iters -5",
        {},
        "--extra-warmup-iters -5",
        "an integer >= 0",
        "give the number of iterations",
    ),
    (
        f"{SQRT} --extra-warmup exp --extra-warmup-fraction 1.5",
        {},
        "--extra-warmup-fraction 1.5",
        "between 0 and 1",
        "give a fraction",
    ),
    (
        f"{SQRT} --extra-warmup exp --extra-warmup-fraction nan",
        {},
        "--extra-warmup-fraction nan",
        "between 0 and 1",
        "give a fraction",
    ),
    ("--extra-warmup decay-away", {}, "--extra-warmup decay-away", "--base-hidden-size", "drop --extra-warmup"),
    (
        f"{SQRT} --extra-warmup-scope width-dependent",
        {},
        "--extra-warmup-scope width-dependent",
        "an --extra-warmup to restrict",
        "drop this flag",
    ),
    ("--alignment-interval -1", {}, "--alignment-interval -1", "an integer >= 0", "give 0 to switch it off"),
    ("--spectral-interval -2", {}, "--spectral-interval -2", "an integer >= 0", "give 0 to switch it off"),
    (
        "--alignment-interval 1 --alignment-tokens 0",
        {"save": "x"},
        "--alignment-tokens 0",
        "a positive integer",
        "give a number",
    ),
    ("--alignment-tokens 64", {}, "--alignment-tokens 64", "--alignment-interval", "or drop this flag"),
    ("--alignment-layers qkv", {}, "--alignment-layers qkv", "--alignment-interval", "or drop this flag"),
    ("--spectral-interval 5", {}, "--metrics-dir not given", "a folder", "--metrics-dir, --save or --tensorboard-dir"),
    (
        "--alignment-interval 1 --alignment-layers (",
        {"save": "x"},
        "--alignment-layers (",
        "a regular expression",
        "correct it",
    ),
    (SQRT, {"optimizer": "sgd"}, "--optimizer sgd", "adam, muon, soap or lion with width scaling", "use one of these"),
    (
        SQRT,
        {"decoupled_weight_decay": False},
        "decoupled_weight_decay False",
        "True (AdamW)",
        "do not set it in the script",
    ),
    (SQRT, {"optimizer_cpu_offload": True}, "--optimizer-cpu-offload given", "not together", "drop one of the two"),
    (SQRT, {"gtp_weight_remat_size": 2}, "--tensor-parallel-num-weight-shards 2", "1 with", "set it to 1"),
    (SQRT, {"lr": None}, "--lr not given", "a positive base learning rate", "give the proxy's LR"),
    ("--vector-lr 1", {"lr": 0.0}, "--lr 0.0", "a positive base learning rate", "give the proxy's LR"),
    (SQRT, {"decoupled_lr": 0.1}, "--decoupled-lr 0.1", "no second rule", "use --vector-lr"),
    ("--vector-lr 0", {}, "--vector-lr 0", "a positive learning rate", "freeze parameters in the model"),
    (
        "--init-scaling fan-in",
        {"init_method_xavier_uniform": True},
        "--init-scaling fan-in",
        "no --init-method-xavier-uniform",
        "drop --init-method-xavier-uniform or --init-scaling fan-in",
    ),
    (f"{SQRT} --init-scaling fan-in", {"use_mup": True}, "--init-scaling fan-in", "no --use-mup", "drop --use-mup"),
    ("--init-scaling fan-in", {"fp8_param_gather": True}, "--init-scaling fan-in", "no --fp8-param-gather", "drop"),
    (
        "--init-scaling fan-in",
        {"perform_initialization": False},
        "--init-scaling fan-in",
        "Megatron's initialisation switched on",
        "drop --no-initialization",
    ),
    (
        SQRT,
        {"use_mup": True, "mup_base_hidden_size": 32},
        "--use-mup with --width-scaling sqrt",
        "a rule whose LR exponent is 1",
        "drop --use-mup",
    ),
    (
        f"{CUSTOM} --lr-width-exponent 0.9 --wd-width-exponent 1",
        {"use_mup": True, "mup_base_hidden_size": 32},
        "--use-mup with --width-scaling custom",
        "a rule whose LR exponent is 1",
        "drop --use-mup",
    ),
    (
        "--vector-lr 0.1",
        {"use_mup": True, "mup_base_hidden_size": 32},
        "--use-mup with --width-scaling none",
        "a rule whose LR exponent is 1",
        "choose such a rule",
    ),
    (
        "--width-scaling independent --base-hidden-size 32",
        {"use_mup": True, "mup_base_hidden_size": 64},
        "--mup-base-hidden-size 64",
        "the same as --base-hidden-size 32",
        "give both the hidden size of the proxy",
    ),
    (
        "--extra-warmup decay-away --base-hidden-size 256",
        {"hidden_size": 64},
        "--base-hidden-size 256",
        "at most the model's own hidden size 64 with --extra-warmup decay-away, whose factor starts at 4, above 1",
        "was it swapped",
    ),
    ("--reference-run x", {}, "--reference-run x", "an --alignment-interval", "or drop this flag"),
    ("--reference-factor 2", {}, "--reference-factor 2.0", "a --reference-run", "add it or drop this flag"),
    ("--reference-count 2", {}, "--reference-count 2", "a --reference-run", "add it or drop this flag"),
    (
        "--alignment-interval 1 --metrics-dir y --reference-run x --reference-factor 1",
        {},
        "--reference-factor 1.0",
        "a number above 1",
        "give 1.5",
    ),
    (
        "--alignment-interval 1 --metrics-dir y --reference-run x --reference-count 0",
        {},
        "--reference-count 0",
        "a positive integer",
        "give 3",
    ),
    (
        "--alignment-interval 1 --metrics-dir y --reference-run ./y/",
        {},
        "--reference-run ./y/",
        "the metrics folder of another run",
        "give the proxy's folder",
    ),
]


@pytest.mark.parametrize(("argv", "megatron", "begins", "expected", "fix"), CASES, ids=lambda value: str(value)[:60])
def test_refusal_names_flag_value_expectation_and_fix(
    argv: str, megatron: dict[str, Any], begins: str, expected: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        flags.validate(namespace(argv, **megatron))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{begins}: expected ")
    wanted, separator, advice = text.removeprefix(f"{begins}: expected ").partition("; ")
    assert separator
    assert expected in wanted
    assert fix in advice


def raising_lines(module: ModuleType) -> set[tuple[str, int]]:
    """(file, line) of every ``raise ConfigError`` in a module."""
    file = inspect.getsourcefile(module) or ""
    return {
        (file, node.lineno)
        for node in ast.walk(ast.parse(Path(file).read_text()))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and getattr(node.exc.func, "id", "") == "ConfigError"
    }


def test_every_refusal_has_a_case() -> None:
    """Whoever adds a refusal adds a line to CASES; so no message is ever seen first by a user."""
    met = set()
    for argv, megatron, *_ in CASES:
        with pytest.raises(ConfigError) as caught:
            flags.validate(namespace(argv, **megatron))
        last = caught.traceback[-1]
        met.add((str(last.path), last.lineno + 1))  # pytest counts lines from 0
    # The parser's choices stop an unknown rule before it comes here.
    with pytest.raises(
        ConfigError, match=r"^--width-scaling cubic: expected one of none, standard, .*; choose"
    ) as caught:
        WidthConfig(rule="cubic").validate()
    met.add((str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1))
    # It converts as well.
    with pytest.raises(ConfigError, match=r"^--vector-lr high: expected a number; correct the value") as caught:
        Settings.of({"vector_lr": "high"})
    met.add((str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1))
    # Before there is a namespace.
    with pytest.raises(ConfigError, match=r"^--yaml-cfg with --lr-width-exponent: expected no flag beside") as caught:
        flags.refuse_yaml_cfg(["--yaml-cfg", "x", "--lr-width-exponent=1"])
    met.add((str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1))

    sites = {
        (file, range(node.lineno, (node.end_lineno or node.lineno) + 1))
        for module in (config_width, config_warmup, config_metrics, options, flags, refusals)
        for file, line in raising_lines(module)
        for node in ast.walk(ast.parse(Path(file).read_text()))
        if isinstance(node, ast.Raise) and node.lineno == line
    }
    unmet = {
        f"{Path(file).name}:{lines[0]}"
        for file, lines in sites
        if not any(met_file == file and line in lines for met_file, line in met)
    }
    assert unmet == set()


@pytest.mark.parametrize(
    "argv",
    [
        "--width-scaling cubic",
        "--base-hidden-size wide",
        "--vector-lr high",
        "--extra-warmup linear",
        "--extra-warmup-iters 1.5",
        "--extra-warmup-scope some",
        "--init-scaling fan-out",
        "--alignment-interval",
    ],
)
def test_parser_refuses_wrong_values(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(argv.split())
    assert caught.value.code == 2
    assert f"argument {argv.split()[0]}:" in capsys.readouterr().err


# --- what is accepted ------------------------------------------------------------------------------------------------


def test_no_flag_asks_for_nothing() -> None:
    assert flags.validate(namespace("")) == Settings()
    assert not Settings().active


@pytest.mark.parametrize("megatron", [{"use_mup": True}, {"use_mup": True, "mup_base_hidden_size": 32}])
def test_megatrons_own_mup_alone_is_none_of_our_business(megatron: dict[str, Any]) -> None:
    assert not flags.validate(namespace("", **megatron)).active


@pytest.mark.parametrize(
    "megatron",
    [
        {"optimizer": "sgd"},
        {"lr": None},
        {"decoupled_lr": 0.1},
        {"decoupled_weight_decay": False},
        {"optimizer_cpu_offload": True},
        {"gtp_weight_remat_size": 2},
        {"perform_initialization": False},
    ],
)
def test_without_our_flags_nothing_of_megatrons_is_refused(megatron: dict[str, Any]) -> None:
    assert not flags.validate(namespace("", **megatron)).active


@pytest.mark.parametrize(
    "argv",
    [
        SQRT,
        "--vector-lr 0.1",
        "--embedding-weight-decay 0",
        "--init-scaling fan-in",
        "--alignment-interval 5 --metrics-dir x",
        "--spectral-interval 5 --metrics-dir x",
        "--metrics-dir x",
        "--override-width-scaling",
    ],
)
def test_whatever_is_asked_for_makes_the_patch_active(argv: str) -> None:
    assert flags.validate(namespace(argv)).active


def test_metrics_beside_megatrons_own_mup() -> None:
    """To measure is not to set: no rule of ours is needed."""
    assert flags.validate(namespace("--metrics-dir x", use_mup=True, mup_base_hidden_size=32)).active


def test_mup_takes_the_lr_and_leaves_us_the_weight_decay() -> None:
    argv = "--width-scaling independent --base-hidden-size 32"
    settings = flags.validate(namespace(argv, use_mup=True, mup_base_hidden_size=32))
    assert settings.width.scale_adam_eps, "Megatron's muP scales eps"
    assert not settings.width.scale_output_layer, "Megatron's muP does not scale the LM head"


@pytest.mark.parametrize(
    ("given", "directory"),
    [
        ({}, None),
        ({"tensorboard_dir": "tb"}, "tb/transfer"),
        ({"tensorboard_dir": "tb", "save": "ckpt"}, "ckpt/transfer"),
        ({"tensorboard_dir": "tb", "save": "ckpt", "metrics_dir": "own"}, "own"),
    ],
)
def test_metrics_folder(given: dict[str, str], directory: str | None) -> None:
    assert Settings.of(given).metrics.directory == directory


def test_folder_of_somebody_elses_alone_writes_nothing() -> None:
    """--save is Megatron's flag: with it alone nothing of ours is active, so no file is written."""
    assert not flags.validate(namespace("", save="ckpt", tensorboard_dir="tb")).active


def test_every_flag_reaches_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """One value per flag, each different from its default, each found again where it belongs."""
    argv = (
        "--width-scaling custom --base-hidden-size 11 --base-ffn-hidden-size 12 --base-kv-projection-size 13 "
        "--base-moe-ffn-hidden-size 14 --base-moe-shared-expert-intermediate-size 15 --base-moe-latent-size 16 "
        "--base-q-lora-rank 17 --base-kv-lora-rank 18 --base-mamba-inner-size 19 --base-linear-attention-inner-size 20 "
        "--lr-width-exponent 0.25 --wd-width-exponent 0.75 --vector-lr 0.125 --embedding-weight-decay 0.0625 "
        "--no-scale-output-layer --scale-adam-eps --init-scaling fan-in --extra-warmup exp --extra-warmup-iters 21 "
        "--extra-warmup-scope width-dependent --alignment-interval 22 --alignment-tokens 23 --alignment-layers qkv "
        "--spectral-interval 24 --metrics-dir here --override-width-scaling --cpu "
        "--allow-rank-differences --reference-run there --reference-factor 2.5 --reference-count 26 --audit-interval 27"
    )
    assert set(re.findall("--[a-z-]+", argv)) == FLAGS - {
        "--allow-untested-megatron",
        "--extra-warmup-fraction",
        "--no-report",
        "--deepspeed",
        "--deepspeed-config",
    }
    monkeypatch.setattr(flags, "read_proxy", lambda folder: None)
    settings = flags.validate(namespace(argv))
    assert settings.width == WidthConfig(
        rule="custom",
        base_hidden_size=11,
        base_dimensions={
            "ffn_hidden_size": 12,
            "kv_projection_size": 13,
            "moe_ffn_hidden_size": 14,
            "moe_shared_expert_intermediate_size": 15,
            "moe_latent_size": 16,
            "q_lora_rank": 17,
            "kv_lora_rank": 18,
            "mamba_inner_size": 19,
            "linear_attention_inner_size": 20,
        },
        lr_exponent=0.25,
        wd_exponent=0.75,
        vector_lr=0.125,
        embedding_weight_decay=0.0625,
        scale_output_layer=False,
        scale_adam_eps=True,
        init_scaling="fan-in",
    )
    assert settings.override
    assert settings.warmup == WarmupConfig("exp", 21, None, "width-dependent")
    assert settings.metrics == config.MetricsConfig(22, 23, "qkv", 24, "here", True, "there", 2.5, 26)
    assert settings.cpu
    assert settings.audit_interval == 27
    assert Settings.of({"deepspeed": True, "deepspeed_config": "x.json"}).engine == config.EngineConfig(True, "x.json")
    fraction = flags.validate(namespace(f"{SQRT} --extra-warmup exp --extra-warmup-fraction 0.5"))
    assert fraction.warmup == WarmupConfig("exp", None, 0.5)


def test_resuming_with_other_numbers_needs_megatrons_consent_too() -> None:
    """Megatron's scheduler compares its own peak LR with the checkpoint's: our flag gives its flag."""
    arguments = namespace(f"{SQRT} --override-width-scaling", override_opt_param_scheduler=False)
    flags.validate(arguments)
    assert arguments.override_opt_param_scheduler
    # Megatron refuses both of its own flags together.
    arguments = namespace(
        f"{SQRT} --override-width-scaling",
        override_opt_param_scheduler=False,
        use_checkpoint_opt_param_scheduler=True,
    )
    flags.validate(arguments)
    assert not arguments.override_opt_param_scheduler


# --- one reader ------------------------------------------------------------------------------------------------------


def test_what_is_not_given_has_its_default() -> None:
    """Whoever holds the arguments: a namespace of before a flag was added, a run.json of another program, a file."""
    assert Settings.of({}) == Settings()
    assert Settings.of(dict.fromkeys(option.name for option in config.OPTIONS)) == Settings()
    assert Settings.of({option.name: option.default for option in config.OPTIONS}) == Settings()
    assert Settings.of(vars(parser().parse_args([]))) == Settings()


@pytest.mark.parametrize(
    "arguments",
    [
        {"width_scaling": "sqrt", "base_hidden_size": "64", "vector_lr": "1e-3", "extra_warmup_iters": 5},
        {"width_scaling": "custom", "lr_width_exponent": 1, "alignment_layers": 3, "metrics_dir": "x", "cpu": True},
    ],
)
def test_a_file_is_read_as_the_command_line_is(arguments: dict[str, Any]) -> None:
    """YAML takes 1e-3 for a text and 3 for a number; `run` makes words of them."""
    words = [f"{config.flag(name)}" + ("" if value is True else f"={value}") for name, value in arguments.items()]
    assert Settings.of(arguments) == Settings.of(vars(parser().parse_args(words)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_hidden_size", "64.0"),
        ("base_hidden_size", 64.0),
        ("base_ffn_hidden_size", True),
        ("vector_lr", "high"),
        ("vector_lr", [0.1]),
        ("alignment_layers", ["a"]),
        ("scale_adam_eps", "yes"),
        ("no_scale_output_layer", 1),
        ("extra_warmup", {}),
    ],
)
def test_a_value_of_another_type_is_one_line(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.of({name: value})
    assert str(caught.value).startswith(f"{config.flag(name)} {value}: expected ")


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        (WarmupConfig(kind="linear"), "--extra-warmup linear"),
        (WarmupConfig("exp", 5, scope="some"), "--extra-warmup-scope some"),
        (WidthConfig(init_scaling="fan-out"), "--init-scaling fan-out"),
    ],
)
def test_a_choice_that_is_none_is_refused_without_a_parser(setting: WarmupConfig | WidthConfig, flag: str) -> None:
    base = WidthConfig("sqrt", 32)
    refused = Settings(base, setting) if isinstance(setting, WarmupConfig) else Settings(setting)
    with pytest.raises(ConfigError, match=f"^{flag}: expected one of .*; choose one of them"):
        refused.validate()


def test_megatrons_mup_alone_is_the_rule_standard_without_the_head() -> None:
    width = Settings.of({"use_mup": True, "mup_base_hidden_size": 16}).width
    assert width.mup_alone
    assert width.described.base_hidden_size == 16
    assert (width.trained_by()("decoder.x"), width.trained_by()("output_layer")) == (RULES["standard"], RULES["none"])
    with_ours = {"use_mup": True, "mup_base_hidden_size": 16, "width_scaling": "independent", "base_hidden_size": 16}
    width = Settings.of(with_ours).width
    assert not width.mup_alone
    assert width.described == width
    assert (width.trained_by()("x"), width.trained_by()("output_layer")) == (RULES["independent"], RULES["none"])


# --- any combination -------------------------------------------------------------------------------------------------

FLOATS = st.one_of(
    st.sampled_from(["0", "1", "-1", "0.5", "nan", "inf", "-inf", "1e400", "5e-324", "4", "-4"]),
    st.floats().map(repr),
)
INTEGERS = st.one_of(st.sampled_from(["0", "1", "-1", "64"]), st.integers().map(str))
TEXTS = st.sampled_from(
    [".*", "(", "[", "qkv|proj", "", "decoder\\.layers\\.[0-3]", "x" * 300, "*", "(?P<n>a)(?P<n>b)"]
)
MEGATRON = st.fixed_dictionaries(
    {
        "optimizer": st.sampled_from(["adam", "sgd", "muon"]),
        "lr": st.sampled_from([None, 0.0, 1e-2, 1.0]),
    },
    optional={
        "use_mup": st.booleans(),
        "mup_base_hidden_size": st.sampled_from([None, 1, 64]),
        "decoupled_lr": st.sampled_from([None, 0.1]),
        "decoupled_weight_decay": st.booleans(),
        "use_megatron_fsdp": st.booleans(),
        "use_torch_fsdp2": st.booleans(),
        "optimizer_cpu_offload": st.booleans(),
        "gtp_weight_remat_size": st.sampled_from([None, 1, 2]),
        "perform_initialization": st.booleans(),
        "init_method_xavier_uniform": st.booleans(),
        "save": st.sampled_from([None, "ckpt"]),
        "tensorboard_dir": st.sampled_from([None, "tb"]),
        "use_checkpoint_opt_param_scheduler": st.booleans(),
    },
)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A few of our flags in any order, some of them twice, with values of the right type."""
    actions = [action for action in parser()._actions if action.dest != "help"]
    argv = []
    for action in draw(st.lists(st.sampled_from(actions), max_size=8)):
        option = action.option_strings[0]
        if action.nargs == 0:
            argv.append(option)
            continue
        if action.choices:
            value = draw(st.sampled_from(sorted(action.choices)))
        elif action.type is int:
            value = draw(INTEGERS)
        elif action.type is float:
            value = draw(FLOATS)
        else:
            value = draw(TEXTS)
        argv.append(f"{option}={value}")
    # Without a base hidden size next to nothing is accepted, and the interesting half would hardly be seen.
    return argv + draw(st.sampled_from([[], SQRT.split(), [*SQRT.split(), "--metrics-dir", "x"], CUSTOM.split()]))


@settings(deadline=None)
@given(command_lines(), MEGATRON)
def test_any_combination_is_accepted_or_refused_in_a_line_each(argv: list[str], megatron: dict[str, Any]) -> None:
    arguments = namespace(argv, **megatron)
    refused = None
    try:
        accepted = flags.validate(arguments)
    except ConfigError as error:
        refused = error
    if refused:
        for error in refused.errors if isinstance(refused, ConfigErrors) else (refused,):
            assert error.flag.split("/")[0].split()[0] in {*FLAGS, *MEGATRONS}
            assert "\n" not in str(error)
            assert error.expected
            assert error.fix
        return
    # What is accepted can be computed with: every factor is a finite number, and no learning rate is zero.
    width = accepted.width
    rule = RULES.get(width.rule) or Rule("custom", width.lr_exponent or 0.0, width.wd_exponent or 0.0, "")
    for role in ROLES:
        for m in (1 / 64, 1.0, 64.0):
            factors = multipliers(rule, role, m, scale_output=width.scale_output_layer, scale_eps=width.scale_adam_eps)
            assert 0 < factors.lr < math.inf
            assert 0 <= factors.weight_decay < math.inf
            assert 0 < factors.eps < math.inf


# Flags of Megatron's that a refusal of ours may name.
MEGATRONS = {
    "--optimizer",
    "--lr",
    "decoupled_weight_decay",  # an attribute a script may set; Megatron has no flag for it
    "--use-megatron-fsdp",
    "--use-torch-fsdp2",
    "--optimizer-cpu-offload",
    "--tensor-parallel-num-weight-shards",
    "--decoupled-lr",
    "--use-mup",
    "--mup-base-hidden-size",
}


@settings(deadline=None)
@given(st.text(), st.none() | st.integers() | st.text(), st.text(), st.text())
def test_errors_are_one_line_whatever_they_quote(flag: str, got: object, expected: str, fix: str) -> None:
    assert "\n" not in str(errors.ConfigError(flag, got, expected, fix))
