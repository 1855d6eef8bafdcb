"""What follows ``python -m megatron_patch run``, and the YAML file of flags: read, refused, never a traceback."""

import argparse
import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_patch.entry.run import (
    DEFAULT_SCRIPT,
    explain_unknown,
    split_command_line,
    yaml_arguments,
)
from megatron_patch.errors import ConfigError
from megatron_patch.files.yaml_flags import load_yaml
from tests.support.pool import ROOT, Pool

# --- the words after `run` -------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path: Path) -> str:
    """The path of a script that need not do anything."""
    path = tmp_path / "script.py"
    path.write_text("")
    return str(path)


def test_script_and_its_arguments(script: str) -> None:
    assert split_command_line([script, "--lr", "1", "--config", "x"]) == (None, script, ["--lr", "1", "--config", "x"])


@pytest.mark.parametrize("config", [["--config", "a.yaml"], ["--config=a.yaml"]])
def test_config_comes_first(config: list[str], script: str) -> None:
    assert split_command_line([*config, script, "--lr", "1"]) == ("a.yaml", script, ["--lr", "1"])
    assert split_command_line([*config, "--lr", "1"]) == ("a.yaml", DEFAULT_SCRIPT, ["--lr", "1"])
    assert split_command_line(config) == ("a.yaml", DEFAULT_SCRIPT, [])


def test_two_dashes_before_the_script(script: str, tmp_path: Path) -> None:
    assert split_command_line(["--", script, "--", "--lr", "1"]) == (None, script, ["--", "--lr", "1"])
    assert split_command_line(["--config", "a.yaml", "--", script]) == ("a.yaml", script, [])
    assert split_command_line(["--"]) == (None, DEFAULT_SCRIPT, [])
    with pytest.raises(ConfigError, match=r"^SCRIPT\.py --lr: expected an existing Python file"):
        split_command_line(["--", "--lr", "1"])


def test_without_a_script_the_projects_own() -> None:
    assert split_command_line(["--lr", "1"]) == (None, DEFAULT_SCRIPT, ["--lr", "1"])
    assert Path(DEFAULT_SCRIPT).relative_to(ROOT) == Path("launch/pretrain.py")


@pytest.mark.parametrize("argv", [["--config"], ["--config="], ["--config", "--lr", "1"], ["--config", ""]])
def test_config_without_a_file(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^--config not given: expected a YAML file; name the file after --config$"):
        split_command_line(argv)


@pytest.mark.parametrize("missing", ["no_such_script.py", ".", "40"])
def test_script_that_does_not_exist(missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"^SCRIPT\.py {missing}: expected an existing Python file; check the path"):
        split_command_line([missing, "--lr", "1"])


# --- YAML ------------------------------------------------------------------------------------------------------------


def written(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "flags.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def parser() -> argparse.ArgumentParser:
    """A small parser with every kind of option that Megatron's has."""
    parser = argparse.ArgumentParser(prog="test", allow_abbrev=False)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--save")
    parser.add_argument("--data-path", nargs="*")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--no-rope-fusion", "--disable-rope-fusion", action="store_false", dest="rope_fusion")
    parser.add_argument("--override-opt_param-scheduler", "--override-opt-param-scheduler", action="store_true")
    parser.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    return parser


def parsed(path: str, command_line: Sequence[str] = ()) -> dict[str, Any]:
    """What the small parser makes of a file and a command line, without the defaults."""
    words = [*yaml_arguments(load_yaml(path), parser(), command_line), *command_line]
    defaults = vars(parser().parse_args([]))
    return {name: value for name, value in vars(parser().parse_args(words)).items() if value != defaults[name]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("num-layers: 4", {"num_layers": 4}),
        ("num_layers: 4", {"num_layers": 4}),
        ("--num-layers: 4", {"num_layers": 4}),
        ("lr: 1e-3", {"lr": 1e-3}),
        ("lr: 0.00001", {"lr": 1e-5}),
        ("lr: -1", {"lr": -1.0}),
        ("lr: -1.0e-3", {"lr": -1e-3}),
        ("lr: .inf", {"lr": float("inf")}),
        ("lr: null", {}),
        ("lr: ~", {}),
        ("lr:", {}),
        ("save: 'a b'", {"save": "a b"}),
        ("save: ''", {"save": ""}),
        ("save: --strange", {"save": "--strange"}),
        ("save: -x", {"save": "-x"}),
        ("save: 'true'", {"save": "true"}),
        ("save: ünïcode", {"save": "ünïcode"}),
        ("bf16: true", {"bf16": True}),
        ("bf16: false", {}),
        ("bf16: null", {}),
        ("no-rope-fusion: true", {"rope_fusion": False}),
        ("disable-rope-fusion: true", {"rope_fusion": False}),
        ("no-rope-fusion: false", {}),
        ("override-opt-param-scheduler: true", {"override_opt_param_scheduler": True}),
        ("override_opt_param_scheduler: true", {"override_opt_param_scheduler": True}),
        ("prefix-caching: false", {"prefix_caching": False}),
        ("prefix-caching: true", {}),
        ("no-prefix-caching: true", {"prefix_caching": False}),
        ("no-prefix-caching: false", {}),
        ("data-path: a", {"data_path": ["a"]}),
        ("data-path: [0.5, a, 0.5, b]", {"data_path": ["0.5", "a", "0.5", "b"]}),
        ("data-path: []", {"data_path": []}),
        ("data-path: [a]\nnum-layers: 3", {"data_path": ["a"], "num_layers": 3}),
        ("base: &b 7\nnum-layers: *b", None),
    ],
)
def test_values(tmp_path: Path, text: str, expected: dict[str, Any] | None) -> None:
    if expected is None:  # an unknown key is passed on, for the script may know it; alone it is nobody's
        assert yaml_arguments(load_yaml(written(tmp_path, text)), parser(), []) == ["--base", "7", "--num-layers", "7"]
    else:
        assert parsed(written(tmp_path, text), []) == expected


@pytest.mark.parametrize(
    ("text", "command_line", "expected"),
    [
        ("lr: 1\nnum-layers: 2", ["--lr", "3"], {"lr": 3.0, "num_layers": 2}),
        ("lr: 1", ["--lr=3"], {"lr": 3.0}),
        ("num_layers: 1", ["--num-layers", "3"], {"num_layers": 3}),
        ("data-path: [a, b]", ["--data-path", "c"], {"data_path": ["c"]}),
        ("disable-rope-fusion: true", ["--no-rope-fusion"], {"rope_fusion": False}),
        ("prefix-caching: false", ["--prefix-caching"], {}),
        ("prefix-caching: true", ["--no-prefix-caching"], {"prefix_caching": False}),
        (
            "override_opt_param_scheduler: false",
            ["--override-opt_param-scheduler"],
            {"override_opt_param_scheduler": True},
        ),
    ],
)
def test_command_line_wins(tmp_path: Path, text: str, command_line: list[str], expected: dict[str, Any]) -> None:
    assert parsed(written(tmp_path, text), command_line) == expected


def test_yaml_gives_way_entirely_to_a_flag_on_the_command_line(tmp_path: Path) -> None:
    """Not only the last of two counts: a value that would be refused is never looked at."""
    flags = load_yaml(written(tmp_path, "num-layers: many\nlr: 1"))
    assert yaml_arguments(flags, parser(), ["--num-layers", "2"]) == ["--lr", "1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "--config FILE: expected valid YAML at line 1; correct it: "),
        ("lr: 1\nnum-layers: 4\n  save: x\n", "--config FILE: expected valid YAML at line 3; correct it: "),
        ("lr: 1\n\tsave: x", "--config FILE: expected valid YAML at line 2; correct it: "),
        ("lr: 1\n---\nlr: 2", "--config FILE: expected valid YAML at line 2; correct it: "),
        ("? [a]\n: 1", "--config FILE: expected valid YAML at line 1; correct it: "),
        ("lr: *nobody", "--config FILE: expected valid YAML at line 1; correct it: "),
        ("lr: 2001-02-30", "--config FILE: expected valid YAML; correct it: "),
        ("lr: " + "9" * 5000, "--config FILE: expected valid YAML; correct it: "),
        ("lr: " + "[" * 1000, "--config FILE: expected valid YAML"),
        ("lr: !!int ''", "--config FILE: expected valid YAML; correct it: "),
        (b"\xff\xfe\x00", "--config FILE: expected valid YAML; correct it: "),
        (b"save: \x01", "--config FILE: expected valid YAML; correct it: "),
        (b"\x80\x04\x95binary", "--config FILE: expected valid YAML; correct it: "),
        (
            "just words",
            "--config FILE: expected a mapping of flag names to values; write one `flag-name: value` a line",
        ),
        ("- lr\n- 1", "--config FILE: expected a mapping of flag names to values; write one `flag-name: value` a line"),
        ("42", "--config FILE: expected a mapping of flag names to values; write one `flag-name: value` a line"),
        ("lr: 1\nlr: 2", "FILE: lr at line 2: expected each flag once, and line 1 has it; delete one"),
        ("num-layers: 1\nlr: 1\nnum_layers: 2", "FILE: num_layers at line 3: expected each flag once, and line 1"),
        ("lr: 1\n--lr: 1", "FILE: --lr at line 2: expected each flag once, and line 1"),
        ("model:\n  lr: 1", "FILE: model {'lr': 1}: expected a value or a list of values; write the flags flat"),
        (
            "data-path: [[a, b]]",
            "FILE: data-path [['a', 'b']]: expected a value or a list of values; write the flags flat",
        ),
        (
            "data-path: [{a: b}]",
            "FILE: data-path [{'a': 'b'}]: expected a value or a list of values; write the flags flat",
        ),
        ("1: 2", "FILE: 1 2: expected the name of a flag before the colon; correct or quote it"),
        ("on: 2", "FILE: True 2: expected the name of a flag before the colon; correct or quote it"),
        ("'': 2", "FILE:  2: expected the name of a flag before the colon; correct or quote it"),
        ("num layers: 2", "FILE: num layers 2: expected the name of a flag before the colon; correct or quote it"),
        ("'lr=1': 2", "FILE: lr=1 2: expected the name of a flag before the colon; correct or quote it"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_refused_files(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    shown = str(caught.value)
    assert shown.startswith(message.replace("FILE", path))
    assert "\n" not in shown


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.system", "!!python/object:object"])
def test_only_plain_yaml_is_read(tmp_path: Path, tag: str) -> None:
    """A file of flags must not be able to run code."""
    target = tmp_path / "made"
    with pytest.raises(ConfigError, match=r"expected valid YAML at line 1; .*could not determine a constructor"):
        load_yaml(written(tmp_path, f"save: {tag} ['{target}']"))
    assert not target.exists()


@pytest.mark.parametrize(("name", "why"), [("absent.yaml", "No such file or directory"), ("", "Is a directory")])
def test_unreadable_file(tmp_path: Path, name: str, why: str) -> None:
    path = f"{tmp_path}/{name}"
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert str(caught.value) == f"--config {path}: expected a readable file; check the path ({why})"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("save: true", "--save True: expected a value, since it takes one; correct the YAML file"),
        ("num-layers: false", "--num-layers False: expected a value, since it takes one; correct the YAML file"),
        ("bf16: 1", "--bf16 1: expected true or false, since it takes no value; correct the YAML file"),
        ("bf16: []", "--bf16 []: expected true or false, since it takes no value; correct the YAML file"),
        ("prefix-caching: 'no'", "--prefix-caching no: expected true or false, since it takes no value; correct"),
        ("lr: [1, 2]", "--lr [1.0, 2.0]: expected one value; correct the YAML file".replace(".0", "")),
    ],
)
def test_values_of_the_wrong_kind(tmp_path: Path, text: str, message: str) -> None:
    """Else `save: false` would make a folder called False, and the parser would complain about a stray 1."""
    with pytest.raises(ConfigError) as caught:
        yaml_arguments(load_yaml(written(tmp_path, text)), parser(), [])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "num-layer: 4",
            "FILE: num-layer 4: expected a flag of Megatron or of megatron_patch; did you mean num-layers?",
        ),
        ("bf61: true", "FILE: bf61 True: expected a flag of Megatron or of megatron_patch; did you mean bf16?"),
        ("rope-fusion: false", "FILE: rope-fusion False: .*; did you mean (no|disable)-rope-fusion?"),
        ("numlayers: null", "FILE: numlayers not given: .*; did you mean num-layers?"),
        ("own-flagg: 1", "FILE: own-flagg 1: .*; did you mean own-flag?"),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path: Path, text: str, message: str) -> None:
    """Also where nothing of them would reach the command line: `rope-fusion: false` does not switch anything off."""
    path = written(tmp_path, text)
    flags, known = load_yaml(path), parser()
    explain_unknown(path, flags, known)
    known.add_argument("--own_flag")  # a script adds its flags after Megatron
    pattern = "^" + message.replace("?", r"\?").replace("FILE", path) + "$"
    with pytest.raises(ConfigError, match=pattern):
        known.parse_args(yaml_arguments(flags, parser(), []))


@pytest.mark.parametrize("key", ["own-flag", "own_flag", "--own_flag"])
def test_flags_of_the_scripts_own(tmp_path: Path, key: str) -> None:
    flags, known = load_yaml(written(tmp_path, f"{key}: 5\nown-switch: true\nlr: 1")), parser()
    explain_unknown("", flags, known)
    known.add_argument("--own_flag", type=int)
    known.add_argument("--own-switch", action="store_true")
    found = known.parse_args(yaml_arguments(flags, parser(), []))
    assert (found.own_flag, found.own_switch, found.lr) == (5, True, 1.0)


def test_unknown_flags_on_the_command_line_are_the_parsers_business(capsys: pytest.CaptureFixture[str]) -> None:
    known = parser()
    explain_unknown("", {"lr": 1}, known)
    with pytest.raises(SystemExit) as caught:
        known.parse_args(["--lr", "1", "--num-layerz", "3"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --num-layerz 3" in capsys.readouterr().err


def test_a_script_that_ignores_unknown_flags_may_go_on_doing_so() -> None:
    known = parser()
    explain_unknown("", {"lr": 1, "own-flag": 2}, known)
    assert known.parse_known_args(["--lr", "1", "--own-flag", "2"])[1] == ["--own-flag", "2"]


# --- any file --------------------------------------------------------------------------------------------------------

KEYS = st.one_of(
    st.sampled_from("num-layers num_layers lr --lr save data-path bf16 no-rope-fusion prefix-caching <<".split()),
    st.text(max_size=8),
)
SCALARS = st.one_of(
    st.sampled_from(
        "true false null ~ 1 -1 1e-3 .nan 0x1F 012 1:30 2001-01-01 2001-13-01 [1,2] [] {} {a: b} '' !!set".split()
    ),
    st.sampled_from(
        ["!!binary aGk=", "!!omap [a: 1]", "!!float x", "!!int ''", "&a 1", "*a", "|\n  x\n", "- x", "'\\0'"]
    ),
    st.text(max_size=12),
)


def never_a_traceback(path: Path, text: str | bytes, command_line: Sequence[str]) -> bool:
    """Read, turn into words, parse: a namespace, a ConfigError of one line, or argparse's exit with code 2.

    Returns whether it became a namespace.
    """
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    refused: ConfigError | None = None
    code: Any = None
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            flags, known = load_yaml(str(path)), parser()
            explain_unknown(str(path), flags, known)
            known.parse_args([*yaml_arguments(flags, parser(), command_line), *command_line])
        except ConfigError as error:
            refused = error
        except SystemExit as stop:
            code = stop.code
    assert code in (None, 0, 2)
    if refused:
        assert "\n" not in str(refused)
        assert refused.expected
        assert refused.fix
    return refused is None and code is None


@pytest.mark.parametrize(
    ("text", "command_line"),
    [
        ("num-layers: 1", ["--lr=2"]),
        ("lr: 1e-3\nbf16: true", ["--num-layers", "1"]),
        ("save: ''\ndata-path: [1,2]", []),
        (b"", []),
        ("prefix-caching: false", ["--no-rope-fusion"]),
    ],
)
def test_of_any_lines_the_sound_ones_are_accepted(tmp_path: Path, text: str | bytes, command_line: list[str]) -> None:
    assert never_a_traceback(tmp_path / "f.yaml", text, command_line)


LINES = st.lists(st.tuples(KEYS, SCALARS), max_size=5).map(lambda pairs: "\n".join(f"{k}: {v}" for k, v in pairs))
ARGUMENTS = st.lists(
    st.sampled_from("--lr 1 --lr=2 --num-layers --bf16 --no-rope-fusion x -- -h --help --no-prefix-caching".split()),
    max_size=3,
)


@settings(deadline=None)
@given(LINES, ARGUMENTS)
def test_any_lines(tmp_path: Path, text: str, command_line: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # --help
        never_a_traceback(tmp_path / "f.yaml", text, command_line)


@settings(deadline=None)
@given(st.one_of(st.text(), st.binary()))
def test_any_bytes(tmp_path: Path, text: str | bytes) -> None:
    never_a_traceback(tmp_path / "f.yaml", text, [])


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(max_size=10), st.sampled_from(["--config", "--config=x", "run", "-", "--"]))))
def test_any_words(argv: list[str]) -> None:
    """What `run` is given is split or refused; no word of the script's gets lost."""
    argv = [word.replace("\0", "") for word in argv]  # no operating system passes it
    try:
        config, script, rest = split_command_line(argv)
    except ConfigError:
        return
    assert os.path.isfile(script)
    assert rest == argv[len(argv) - len(rest) :]
    assert (config is not None) == (argv[:1] != [] and argv[0].partition("=")[0] == "--config")


def fuzz_megatrons_parser(folder: str) -> int:
    """In a worker: files of Megatron's real flags with all sorts of values; returns how many were accepted."""
    import traceback

    from megatron_patch.upstream.flags import add_arguments
    from megatron_patch.upstream.patch import megatron_parser

    real = add_arguments(megatron_parser())
    names = sorted(option.removeprefix("--") for option in real._option_string_actions if option.startswith("--"))
    good = st.sampled_from([("num-layers", "2"), ("lr", "1e-3"), ("bf16", "true"), ("data-path", "[a, b]")])
    lines = st.lists(st.one_of(good, st.tuples(st.sampled_from(names), SCALARS)), max_size=4)
    accepted = 0

    @settings(deadline=None, database=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
    @given(lines, ARGUMENTS)
    def any_file(pairs: list[tuple[str, str]], command_line: list[str]) -> None:
        nonlocal accepted
        path = Path(folder) / "f.yaml"
        path.write_text("\n".join(f"{key}: {value}" for key, value in pairs), errors="surrogatepass")
        silent = io.StringIO()
        try:
            with contextlib.redirect_stderr(silent), contextlib.redirect_stdout(silent):
                flags = load_yaml(str(path))
                real.__dict__.pop("parse_args", None)
                explain_unknown(str(path), flags, real)
                real.parse_args([*yaml_arguments(flags, real, command_line), *command_line])
            accepted += 1
        except ConfigError as error:
            refused = str(error)
            assert "\n" not in refused
        except SystemExit as stop:
            assert stop.code in (0, 2)  # noqa: PT017
        except Exception as error:
            # Some of Megatron's own value types raise what argparse does not expect.
            place = traceback.extract_tb(error.__traceback__)[-1].filename
            assert "megatron_patch" not in place, error  # noqa: PT017

    any_file()
    return accepted


def test_any_values_of_megatrons_flags(pool: Pool, tmp_path: Path) -> None:
    (accepted,) = pool.run(fuzz_megatrons_parser, distributed=False, folder=str(tmp_path))
    assert accepted > 3, "next to nothing gets through: the fuzz does not reach the parser"
