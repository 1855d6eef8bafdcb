"""Any flags and any damaged file: accepted, or refused in one line with exit code 2; no traceback, nothing written.

Fuzzed elsewhere: YAML files of flags and Megatron's own flags (tests/entry/test_flags_file.py), our flags with values
of the right type (tests/test_config.py).
"""

import ast
import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch.errors import ConfigError
from megatron_patch.files.json_lines import JsonLines
from megatron_patch.runs.read import read_trials
from megatron_patch.runs.run import read_run
from megatron_patch.runs.trial import COLUMNS
from megatron_patch.sweep.axes import safe_name
from megatron_patch.upstream import flags
from tests.support.commands import commands
from tests.support.flags import parser
from tests.support.pool import ROOT, Pool
from tests.support.run_folders import write_events, write_hyperparameters, write_metrics, write_record
from tests.support.training import TINY

FUZZ = settings(deadline=None, max_examples=150)


@contextlib.contextmanager
def refusals(name: str = "") -> Iterator[None]:
    """What is inside goes well, or is refused in one line that names the file; anything else is an error."""
    refused = None
    try:
        yield
    except ConfigError as error:
        refused = error
    assert refused is None or ("\n" not in str(refused) and name in str(refused))


# --- our flags -------------------------------------------------------------------------------------------------------

OPTIONS = sorted(option for option in parser()._option_string_actions if option not in ("-h", "--help"))
VALUES = st.one_of(
    st.sampled_from(
        "0 1 -1 64 0.5 1e400 nan -inf 1e-320 0x10 1_0 ٣ none sqrt custom exp decay-away all fan-in ( [a .* --lr".split()
    ),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=6),
)
WORDS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(OPTIONS), VALUES).map("=".join),
        st.tuples(st.sampled_from(OPTIONS), VALUES).map(" ".join),
        st.sampled_from(OPTIONS),
        st.sampled_from(["--width-scaling=sqrt", "--base-hidden-size=8", "--metrics-dir=x", "--alignment-interval=1"]),
    ),
    max_size=7,
)


def test_any_words_after_our_flags() -> None:
    """Through the real parser and the real validation: a namespace that passes both, or a refusal of either."""
    outcomes: Counter[str] = Counter()

    @FUZZ
    @given(WORDS)
    def one(words: list[str]) -> None:
        argv = [part for word in words for part in word.split(" ", 1)]
        silent = io.StringIO()
        try:
            with contextlib.redirect_stderr(silent), contextlib.redirect_stdout(silent):
                arguments = parser().parse_args(argv)
        except SystemExit as stop:
            assert stop.code == 2  # noqa: PT017
            assert "error: " in silent.getvalue()
            outcomes["refused by the parser"] += 1
            return
        arguments.optimizer, arguments.lr = "adam", 1e-2
        outcome = "refused by the validation"
        with refusals():
            flags.validate(arguments)
            outcome = "accepted" if words else "nothing asked for"
        outcomes[outcome] += 1

    one()
    assert min(outcomes[way] for way in ("refused by the parser", "refused by the validation", "accepted")) > 0


# --- files of runs ---------------------------------------------------------------------------------------------------

RECORDS = ("run.json", "hyperparameters.json")
LINES = ("alignment.jsonl", "equilibrium.jsonl", "sublayers.jsonl")
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=4),
        st.sampled_from([0, -1, "none", "/", "..", "validation", "2026-01-01T10:00:00", "2026-01-01", "x" * 5000]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def damages(draw: st.DrawFn) -> Any:
    """What turns bytes into damaged ones, as a function: cut off, bits flipped, bytes put in, all new, all nested."""
    kind = draw(st.sampled_from(["cut", "flip", "put", "new", "deep"]))
    where, byte, text = draw(st.floats(0, 1)), draw(st.integers(1, 255)), draw(st.binary(max_size=12))

    def damage(content: bytes) -> bytes:
        at = int(where * (len(content) - 1))
        return {
            "cut": content[:at],
            "flip": content[:at] + bytes([content[at] ^ byte]) + content[at + 1 :],
            "put": content[:at] + text + content[at:],
            "new": text,
            "deep": b"[" * 100_000,
        }[kind]

    return damage


@st.composite
def changes(draw: st.DrawFn) -> Any:
    """What replaces or deletes one value somewhere in a JSON value, as a function."""
    steps = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4))
    delete, value = draw(st.booleans()), draw(JSON)

    def change(content: Any) -> Any:
        inner, last = content, steps[-1]
        for step in steps:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            if not keys:
                return content
            key = keys[int(step * len(keys))]
            if step is last or not isinstance(inner[key], (dict, list)):
                if delete:
                    del inner[key]
                else:
                    inner[key] = value
                return content
            inner = inner[key]
        return content

    return change


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run with every file, TensorBoard's included."""
    folder = tmp_path_factory.mktemp("sound")
    transfer = folder / "transfer"
    transfer.mkdir()
    write_record(transfer, tensorboard_dir=f"{folder}/tensorboard", save=f"{folder}")
    write_hyperparameters(transfer)
    write_metrics(transfer, [2, 4], layers=1)
    write_events(folder / "tensorboard", [1, 2, 3])
    read_everything(transfer)
    return folder


def read_everything(folder: Path) -> None:
    """Read a run and ask it all that a report asks for."""
    run = read_run(str(folder), "name")
    assert isinstance(run.rule, str)
    assert run.m > 0
    assert len(run.evaluated("test").values) == len(run.evaluated("test").iterations)
    assert run.best is None or math.isfinite(run.best[0])


def read_damaged(sound: Path, name: str, content: bytes) -> bool:
    """Put a damaged file in the place of a sound one and read: a run, perhaps with a note, or a line that names it.

    Returns whether a run was read.
    """
    path = next(sound.rglob(name))
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        with refusals(name):
            read_everything(sound / "transfer")
            return True
        return False
    finally:
        path.write_bytes(whole)


def test_sound_files_and_slightly_damaged_ones_are_read(sound: Path) -> None:
    """What refuses everything would pass all of the fuzzing below."""
    for name in [*RECORDS, *LINES]:
        content = next(sound.rglob(name)).read_bytes()
        assert read_damaged(sound, name, content), name
        assert read_damaged(sound, name, content.rstrip(b"\n") + b"  \n"), name
    for name in LINES:  # as a kill leaves it
        content = next(sound.rglob(name)).read_bytes()
        assert read_damaged(sound, name, content + content[: len(content) // 5].replace(b"\n", b"")), name
    (events,) = (sound / "tensorboard").iterdir()
    assert read_damaged(sound, events.name, events.read_bytes()[:-3])


@FUZZ
@given(st.sampled_from([*RECORDS, *LINES]), damages())
def test_any_damage_to_the_bytes(sound: Path, name: str, damage: Any) -> None:
    read_damaged(sound, name, damage(next(sound.rglob(name)).read_bytes()))


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every value inside a JSON value as (the dict or list that holds it, its key)."""
    for key in list(content) if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], (dict, list)):
            yield from places(content[key])


@pytest.mark.parametrize("name", RECORDS)
def test_any_value_replaced(sound: Path, tmp_path: Path, name: str) -> None:
    """Each value in turn by one of every kind, and by none."""
    for record in RECORDS:
        shutil.copy(sound / "transfer" / record, tmp_path)
    text = (tmp_path / name).read_text()
    number, accepted, tried = len(list(places(json.loads(text)))), 0, 0
    for i in range(number):
        for value in (
            "missing",
            None,
            True,
            -1,
            0,
            math.nan,
            "x",
            "2026-01-01",
            "/",
            [],
            {},
            [None],
            {"a": 1},
            10**400,
        ):
            content = json.loads(text)
            holder, key = list(places(content))[i]
            if value == "missing":
                del holder[key]
            else:
                holder[key] = value
            (tmp_path / name).write_text(json.dumps(content))
            tried += 1
            with refusals(name):
                read_everything(tmp_path)
                accepted += 1
    assert number > 30
    print(f"{name}: {accepted} of {tried} accepted")
    assert 0.05 * tried < accepted < tried


@FUZZ
@given(st.sampled_from(LINES), st.integers(0, 3), changes())
def test_any_change_of_a_line(sound: Path, name: str, which: int, change: Any) -> None:
    lines = (sound / "transfer" / name).read_text().splitlines()
    lines[which % len(lines)] = json.dumps(change(json.loads(lines[which % len(lines)])))
    read_damaged(sound, name, ("\n".join(lines) + "\n").encode())


@FUZZ
@given(damages())
def test_any_damage_to_tensorboards_file(sound: Path, damage: Any) -> None:
    (path,) = (sound / "tensorboard").iterdir()
    read_damaged(sound, path.name, damage(path.read_bytes()))


@FUZZ
@given(st.sampled_from(LINES), st.integers(0, 5), damages())
def test_resuming_over_any_damage(sound: Path, tmp_path: Path, name: str, iteration: int, damage: Any) -> None:
    """Opening for a resume keeps whole lines of before the checkpoint only, the first ones of the file."""
    path, content = tmp_path / name, (sound / "transfer" / name).read_bytes()
    damaged = damage(content)
    path.write_bytes(damaged)
    with contextlib.redirect_stderr(io.StringIO()):
        JsonLines(str(path), iteration).write([{"iteration": 9}])
    kept, _, added = path.read_bytes().rstrip(b"\n").rpartition(b"\n")
    assert added == b'{"iteration": 9}'
    assert damaged.startswith(kept)
    for line in kept.splitlines():
        assert json.loads(line)["iteration"] <= iteration


# --- tables ----------------------------------------------------------------------------------------------------------

CELLS = st.one_of(
    st.sampled_from("64 256 0.01 1e-3 nan inf -1 0 sqrt none 1e999 ٣ \x00 \" ' ,".split(" ")), st.text(max_size=5)
)
TABLES = st.tuples(
    st.lists(st.sampled_from([*COLUMNS, "hidden_size", "lr", "loss", "x", ""]), max_size=8)
    | st.just(["hidden_size", "lr", "loss", "weight_decay", "rule"]),
    st.lists(st.lists(CELLS, max_size=6) | st.lists(CELLS, min_size=5, max_size=5), max_size=5),
).map(lambda table: "\n".join(",".join(row) for row in [table[0], *table[1]]))


@FUZZ
@given(st.one_of(TABLES, st.text(), st.binary()))
def test_any_table(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "trials.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with refusals(str(path)):
        for trial in read_trials(str(path)):
            assert trial.hidden_size > 0
            assert trial.lr > 0


def test_a_sound_table_among_those_of_any_kind(tmp_path: Path) -> None:
    path = tmp_path / "trials.csv"
    path.write_text("hidden_size,lr,loss,weight_decay,rule\n64,0.01,3.5,0.1,sqrt\n256,1e-3,nan,0,none\n")
    assert [(t.hidden_size, t.lr, t.rule) for t in read_trials(str(path))] == [(64, 0.01, "sqrt"), (256, 1e-3, "none")]


# --- names that become folders ---------------------------------------------------------------------------------------


@FUZZ
@given(
    st.one_of(
        st.text(), st.sampled_from(["", ".", "..", "../..", "/etc", "a/../../b", "~", "C:\\x", "a\0b", "x" * 500])
    )
)
def test_a_name_in_a_sweep_never_leads_out_of_its_folder(text: str) -> None:
    name = safe_name(text)
    assert os.path.dirname(os.path.normpath(os.path.join("/sweep/trials", name))) == "/sweep/trials"
    assert "\0" not in name
    assert 0 < len(name.encode()) < 256


# --- whole commands --------------------------------------------------------------------------------------------------


def start(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the project in a process of its own."""
    return subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_commands_refuse_bad_input_in_one_line(tmp_path: Path, sound: Path) -> None:
    """Exit code 2, one line on stderr, no traceback; and the folder they run in, with all below it, is as it was."""
    (tmp_path / "code.yaml").write_text("save: !!python/object/apply:os.mkdir [made]\n")
    (tmp_path / "deep.yaml").write_text("lr: " + "[" * 2000)
    shutil.copytree(sound, tmp_path / "damaged")
    (tmp_path / "damaged" / "transfer" / "run.json").write_text('{"status": ')
    (tmp_path / "trials.csv").write_text("hidden_size,lr,loss\n64,fast,2\n")
    before = contents(tmp_path)
    for argv in (
        ["-m", "megatron_patch", "run", "--config", "code.yaml"],
        ["-m", "megatron_patch", "run", "--config", "deep.yaml"],
        ["-m", "megatron_patch", "explain", "--config", "code.yaml"],
        [str(ROOT / "tools" / "report.py"), "damaged", "--output", "report.html"],
        [str(ROOT / "tools" / "report.py"), "absent", "--output", "report.html"],
    ):
        ended = start(*argv, cwd=tmp_path)
        assert (ended.returncode, ended.stdout) == (2, ""), (argv, ended)
        assert ended.stderr.startswith("error: "), argv
        assert ended.stderr.count("\n") == 1, argv
        assert contents(tmp_path) == before, argv


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Everything below a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_run_that_cannot_write_its_metrics_does_not_start(pool: Pool, tmp_path: Path) -> None:
    """A file is where the metrics folder should be, or the path leads nowhere: said at the start, in one line."""
    (tmp_path / "taken").write_text("mine")
    argv = ["--cpu", "--mock-data", *TINY, "--train-iters", "2", "--alignment-interval", "1", "--metrics-dir"]
    argvs = [[*argv, "taken"], [*argv, "/dev/null/x"]]
    ended = pool.run(commands, distributed=False, argvs=argvs, cwd=str(tmp_path))[0]
    for e in ended:
        assert (e.code, e.error) == (2, "")
        errors = [line for line in e.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "--metrics-dir" in errors[0]
        assert "Traceback" not in e.err + e.out
    assert contents(tmp_path) == {tmp_path / "taken": b"mine"}


# --- nothing of others' is run ---------------------------------------------------------------------------------------

FORBIDDEN = {
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "dill.load",
    "joblib.load",
    "marshal.loads",
    "shelve.open",
    "torch.jit.load",
    "pandas.read_pickle",
    "os.system",
    "eval",
}


def unsafe(source: str) -> Iterator[str]:
    """Yield every call that could run what a file of somebody else's says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "marshal"):
            yield f"line {node.lineno}: from {node.module} import"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given_ = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in FORBIDDEN:
            yield f"line {node.lineno}: {name}"
        if name == "torch.load" and given_.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if given_.get("allow_pickle") == "True" or given_.get("shell") == "True":
            yield f"line {node.lineno}: {name} with {given_}"


@pytest.mark.parametrize("folder", ["megatron_patch", "tools", "launch", "benchmarks"])
def test_the_source_loads_nothing_that_can_run_code(folder: str) -> None:
    found = {
        str(path.relative_to(ROOT)): calls
        for path in (ROOT / folder).rglob("*.py")
        if (calls := list(unsafe(path.read_text(encoding="utf-8"))))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("yaml.load(f)", 1),
        ("yaml.safe_load(f)", 0),
        ("torch.load(f)", 1),
        ("torch.load(f, weights_only=False)", 1),
        ("torch.load(f, weights_only=True)", 0),
        ("pickle.loads(b)", 1),
        ("pickle.dumps(b)", 0),
        ("from pickle import loads", 1),
        ("numpy.load(f, allow_pickle=True)", 1),
        ("subprocess.run(x, shell=True)", 1),
        ("json.loads(f)", 0),
    ],
)
def test_the_check_finds_them(source: str, number: int) -> None:
    assert len(list(unsafe(source))) == number
