"""Trials survive the way through a CSV file; every mistake in one is a line that names file, line and cell."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.config import WIDTH_RULES
from megatron_patch.errors import ConfigError
from megatron_patch.files.run_json import RunJson
from megatron_patch.runs.read import read_trials
from megatron_patch.runs.trial import Trial, read_csv, to_csv, trial_of_run

positive = st.floats(1e-12, 1e12)
trials = st.builds(
    Trial,
    hidden_size=st.integers(1, 10**6),
    lr=positive,
    loss=st.floats(),
    weight_decay=st.none() | positive,
    rule=st.sampled_from(WIDTH_RULES),
    vector_lr=st.none() | positive,
    seed=st.none() | st.integers(0, 10**9),
    steps=st.none() | st.integers(1, 10**9),
)


@given(st.lists(trials, min_size=1, max_size=5))
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, written: list[Trial]) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_text(to_csv(written))
    read = read_csv(str(path))
    assert [repr(Trial(**{**vars(t), "source": ""})) for t in read] == [repr(t) for t in written]


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    for prefix in (b"", b"hidden_size,lr,loss\n", b"hidden_size,lr,loss\n32,0.1,3\n"):
        path.write_bytes(prefix + content)
        with contextlib.suppress(ConfigError):  # anything else is a traceback for the user
            read_csv(str(path))


def test_what_table_programs_write(tmp_path: Path) -> None:
    """A byte-order mark, CRLF, spaces, integers with a point, empty cells."""
    text = '\ufeffhidden_size, lr ,loss,seed,steps\r\n32,"0.01", 3.5 ,1.0,\r\n32,0.02,NaN,,100.0\r\n'
    (tmp_path / "t.csv").write_text(text, newline="")
    first, second = read_csv(str(tmp_path / "t.csv"))
    assert (first.lr, first.loss, first.seed, first.steps) == (0.01, 3.5, 1, None)
    assert second.diverged and (second.seed, second.steps) == (None, 100)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "with the columns none: expected a column hidden_size"),
        ("hidden_size,lr\n", "a column loss"),
        ("hidden_size,lr,loss,los\n1,1,1,1\n", "column 'los'"),
        ("hidden_size,lr,loss,loss\n1,1,1,1\n", "at most once"),
        ("hidden_size,lr,loss\n32,0.1,3\n32,x,3\n", "line 3 lr 'x': expected a number"),
        ("hidden_size,lr,loss\n32.5,0.1,3\n", "line 2 hidden_size '32.5': expected an integer"),
        ("hidden_size,lr,loss\n32,0.1\n", "line 2"),
        ("hidden_size,lr,loss\n32,0.1,3,4\n", "as many cells"),
        ("hidden_size,lr,loss\n32,-0.1,3\n", "line 2 (lr -0.1"),
        ("hidden_size,lr,loss\n32,inf,3\n", "line 2 (lr inf"),
        ("hidden_size,lr,loss\n32,0.1,\n", "line 2 loss ''"),
        ("hidden_size,lr,loss,weight_decay\n32,0.1,3,-1\n", "weight_decay -1.0"),
        ("hidden_size,lr,loss,rule\n32,0.1,3,cubic\n", "rule 'cubic'"),
        ("hidden_size,lr,loss\n", "at least one row"),
        ('hidden_size,lr,loss\n32,0.1,"3\n', "a CSV table in UTF-8"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_csv(str(tmp_path / "t.csv"))
    assert says in str(caught.value)


def test_a_file_that_is_no_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"hidden_size,lr,loss\n\xff\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_csv(str(tmp_path / "t.csv"))
    with pytest.raises(ConfigError, match="no such file"):
        read_trials(str(tmp_path / "x"))


RECORD: dict[str, Any] = {
    "status": "finished",
    "final_loss": 3.5,
    "train_iterations": 10,
    "arguments": {"hidden_size": 32, "lr": 0.01, "weight_decay": 0.1, "seed": 1, "width_scaling": "sqrt"},
}


def test_trial_of_a_run() -> None:
    trial = trial_of_run(RunJson("run.json", RECORD))
    assert trial == Trial(32, 0.01, 3.5, 0.1, "sqrt", None, 1, 10, "run.json")
    assert trial_of_run(RunJson("run.json", {**RECORD, "status": "diverged", "final_loss": None})).diverged
    assert math.isnan(trial_of_run(RunJson("run.json", {**RECORD, "final_loss": math.nan})).loss)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"status": "running"}, "status running"),
        ({"status": "failed"}, "status failed"),
        ({"final_loss": None}, "no validation loss"),
        ({"arguments": {}}, "no 'hidden_size'"),
        ({"arguments": None}, "the run.json of a training run"),
        ({"arguments": {**RECORD["arguments"], "lr": "x"}}, "could not convert"),
        ({"arguments": {**RECORD["arguments"], "lr": 0}}, "above 0"),
        ({"arguments": {**RECORD["arguments"], "hidden_size": math.inf}}, "cannot convert float infinity"),
    ],
)
def test_records_that_are_no_trials(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps({**RECORD, **changed}))
    with pytest.raises(ConfigError) as caught:
        read_trials(str(tmp_path))
    assert says in str(caught.value) and "run.json" in str(caught.value)


def test_a_damaged_record(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="restore it"):
        read_trials(str(tmp_path))
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"the run\.json of a training run"):
        read_trials(str(tmp_path))
