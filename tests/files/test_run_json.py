"""The reader of run.json asks for nothing but what it is asked for, and says what is wrong with that."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.files.run_json import LOSS, Evaluation, RunJson, Status
from megatron_patch.files.whole import NotAsWritten

WHOLE: dict[str, Any] = {
    "status": "finished",
    "started": "2026-01-01T10:00:00+00:00",
    "updated": "2026-01-01T10:02:05+00:00",
    "iteration": 40,
    "train_iterations": 40,
    "final_loss": 2.5,
    "train_loss": {LOSS: 2.25},
    "evaluations": [{"iteration": 40, "set": "validation", LOSS: 2.5}],
    "layout": {"world": 2},
    "versions": {"torch": "2"},
    "command": ["a.py", "--lr"],
    "arguments": {"lr": 0.01},
}


def test_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(WHOLE))
    run = RunJson.read(str(path))
    assert (run.path, run.status, run.seconds, run.iteration) == (str(path), Status.FINISHED, 125.0, 40)
    assert (run.train_iterations, run.final_loss, run.last_train_loss) == (40, 2.5, 2.25)
    assert run.evaluations == (Evaluation(40, "validation", {LOSS: 2.5}),)
    assert (run.layout, run.versions, run.command) == ({"world": 2}, {"torch": "2"}, ("a.py", "--lr"))
    assert run.arguments == {"lr": 0.01}
    assert run.place == "status finished at iteration 40"


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        ({"status": None}, "arguments", None),
        ({"arguments": []}, "arguments", r"arguments is \[\]"),
        ({"train_iterations": float("inf")}, "train_iterations", "infinity"),
        ({"train_iterations": None}, "train_iterations", None),
        ({"evaluations": [{"iteration": 1}]}, "evaluations", "no 'set'"),
        ({"evaluations": 3}, "evaluations", "int"),
        ({"train_loss": 3.0}, "last_train_loss", "get"),
        ({"started": "yesterday"}, "seconds", "yesterday"),
    ],
)
def test_what_is_damaged_matters_where_it_is_asked_for(change: dict[str, Any], name: str, says: str | None) -> None:
    run = RunJson("run.json", WHOLE | change)
    if says is None:
        getattr(run, name)
        return
    with pytest.raises(NotAsWritten, match=says):
        getattr(run, name)
    assert run.stands(Status.FINISHED)


@pytest.mark.parametrize("content", [[], {}, None, "finished"])
def test_what_is_no_run_json(content: object) -> None:
    run = RunJson("run.json", content)
    assert not run.stands(*Status)
    with pytest.raises(NotAsWritten):
        run.status  # noqa: B018
