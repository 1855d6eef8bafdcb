"""What a run leaves behind: run.json, hyperparameters.json, scalars for TensorBoard and W&B, a line on the console."""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.pool import Pool, RankFailure
from tests.support.training import TINY, Hooks, Outcome, Run, train

STEPS = 6
WARMUP = 2  # iterations, as in TINY
PEAK, LOW, DECAY = 1e-2, 1e-3, 0.1
# m = 4 for the hidden size of 32, 2 for the MLP's width of 128; the weight decay rises from 0 to its end.
FLAGS = [
    *TINY,
    *"--width-scaling sqrt --base-hidden-size 8 --base-ffn-hidden-size 64".split(),
    *"--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay".split(),
    str(DECAY),
    *"--eval-interval 2 --eval-iters 1".split(),
]
LONGER = [*FLAGS, "--train-iters", str(STEPS)]  # then a run may stop before its end
# (LR, weight decay) over those of the base model, by class.
CLASSES = {
    "embedding": (1.0, 1.0),
    "matrix_m2": (2**-0.5, 2**0.5),
    "matrix_m4": (0.5, 2.0),
    "vector": (1.0, 0.0),
}


def schedule(iteration: int) -> tuple[float, float]:
    """Base LR and weight decay of the step after `iteration`: linear warmup, linear decay over 100; linear rise."""
    if iteration <= WARMUP:
        lr = PEAK * iteration / WARMUP
    else:
        lr = LOW + (PEAK - LOW) * (1 - (iteration - WARMUP) / (100 - WARMUP))
    return lr, DECAY * iteration / STEPS


class FakeWandb:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []

    def log(self, scalars: dict[str, Any], step: int) -> None:
        ours = {name: float(value) for name, value in scalars.items() if name.startswith(("lr/", "weight_decay/"))}
        self.logged.append((ours, step))

    def finish(self) -> None:
        pass


class Recorded(Hooks):
    """A run with the patch; keeps what run.json said along the way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents: list[dict[str, Any]] = []

    def before_arguments(self) -> None:
        from megatron_patch.upstream.patch import Session

        Session().begin()

    def read(self) -> None:
        path = self.folder / "run.json"
        self.contents.append(json.loads(path.read_text()) if path.exists() else {})

    def built(self, run: Run) -> None:
        self.read()

    def stepped(self, run: Run, iteration: int, losses: dict[str, float]) -> None:
        self.read()

    def result(self, run: Run) -> Any:
        self.read()
        return self.contents


class RecordedByWandb(Recorded):
    """The same with a writer of W&B's."""

    def built(self, run: Run) -> None:
        from megatron.training import global_vars

        self.wandb = FakeWandb()
        global_vars._GLOBAL_WANDB_WRITER = self.wandb
        super().built(run)

    def result(self, run: Run) -> Any:
        return super().result(run), self.wandb.logged


@pytest.fixture(scope="module")
def finished(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, str]:
    """A whole run on one rank: its folder, its outcome, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    argv = [*FLAGS, "--tensorboard-dir", str(folder)]
    outcome = pool.run(train, argv=argv, steps=STEPS, hooks=RecordedByWandb(folder / "transfer"))[0]
    return folder, outcome, pool.printed[0]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Everything in the TensorBoard files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_class(finished: tuple[Path, Outcome, str]) -> None:
    folder, _, _ = finished
    found = scalars(folder)
    assert {tag for tag in found if tag.startswith("lr/")} == {f"lr/{name}" for name in CLASSES}
    assert {tag for tag in found if tag.startswith("weight_decay/")} == {f"weight_decay/{name}" for name in CLASSES}
    for name, (lr_factor, decay_factor) in CLASSES.items():
        for tag, factor, which in ((f"lr/{name}", lr_factor, 0), (f"weight_decay/{name}", decay_factor, 1)):
            expected = [(i, schedule(i)[which] * factor) for i in range(1, STEPS + 1)]
            assert [step for step, _ in found[tag]] == [step for step, _ in expected]
            # TensorBoard keeps float32.
            assert [value for _, value in found[tag]] == pytest.approx([value for _, value in expected], rel=1e-6)
    # The class with the factor 1 has the one LR that Megatron logs by itself.
    assert found["lr/embedding"] == found["learning-rate"]


def test_wandb_has_the_same(finished: tuple[Path, Outcome, str]) -> None:
    _, outcome, _ = finished
    _, logged = outcome.extra
    ours = [(entry, step) for entry, step in logged if entry]
    assert len(ours) < len(logged), "Megatron logs as well"
    assert [step for _, step in ours] == list(range(1, STEPS + 1))
    for entry, step in ours:
        lr, decay = schedule(step)
        assert entry == pytest.approx(
            {f"lr/{name}": lr * a for name, (a, _) in CLASSES.items()}
            | {f"weight_decay/{name}": decay * b for name, (_, b) in CLASSES.items()},
            rel=1e-12,
        )
    steps = [step for _, step in logged]
    assert steps == sorted(steps), "W&B drops what is logged at an earlier step"


def test_console_line(finished: tuple[Path, Outcome, str]) -> None:
    _, _, printed = finished
    lines = re.findall(r"^ iteration +(\d+) \| lr / weight decay: (.*) \|$", printed, re.MULTILINE)
    assert [int(iteration) for iteration, _ in lines] == list(range(1, STEPS + 1))
    for iteration, text in lines:
        lr, decay = schedule(int(iteration))
        shown = {}
        for entry in text.split(" | "):
            name, lr_text, slash, decay_text = entry.split()
            assert slash == "/"
            shown[name] = (float(lr_text), float(decay_text))
        assert shown.keys() == CLASSES.keys()
        for name, (a, b) in CLASSES.items():
            assert shown[name] == pytest.approx((lr * a, decay * b), rel=1e-3)
    # At the start: the peak and the end.
    assert re.search(r"^> +matrix_m4 +lr 0\.005 +weight decay 0\.2 +eps 1e-08$", printed, re.MULTILINE)


def test_run_json_at_the_start_along_the_way_and_in_the_end(finished: tuple[Path, Outcome, str]) -> None:
    folder, outcome, printed = finished
    contents, _ = outcome.extra
    start, along, end = contents[0], contents[1:-1], contents[-1]
    keys = {
        "status",
        "started",
        "updated",
        "command",
        "job",
        "host",
        "iteration",
        "train_iterations",
        "final_loss",
        "best_loss",
        "train_loss",
        "evaluations",
        "layout",
        "versions",
        "arguments",
    }
    assert [content.keys() for content in contents] == [keys] * len(contents)
    assert (start["status"], start["iteration"], start["train_iterations"]) == ("running", 0, STEPS)
    assert (start["evaluations"], start["final_loss"], start["best_loss"], start["train_loss"]) == (
        [],
        None,
        None,
        None,
    )
    assert start["layout"] == {"world": 1, "tensor": 1, "pipeline": 1, "context": 1, "expert": 1, "data": 1}
    assert {"megatron-patch", "megatron-core", "torch", "python"} <= start["versions"].keys()
    assert start["arguments"]["width_scaling"] == "sqrt"
    assert start["arguments"]["hidden_size"] == 32
    assert start["arguments"]["world_size"] == 1
    assert "--width-scaling" in start["command"]
    # Seen in the middle of each step: the evaluation after an even iteration is in the file at the next one.
    assert [len(content["evaluations"]) for content in along] == [0, 0, 1, 1, 2, 2]
    assert [content["iteration"] for content in along] == [0, 0, 2, 2, 4, 4]
    assert all(content["status"] == "running" for content in along)
    # The losses are those that Megatron printed.
    assert (end["status"], end["iteration"]) == ("finished", STEPS)
    shown = re.findall(r"validation loss at iteration (\d+)(?: on (\w+) set)? \| lm loss value: (\S+)", printed)
    told = {(int(i), "test" if on == "test" else "validation"): float(loss) for i, on, loss in shown}
    assert told.keys() == {(2, "validation"), (4, "validation"), (6, "validation"), (6, "test")}
    recorded = {(entry["iteration"], entry["set"]): entry["lm loss"] for entry in end["evaluations"]}
    assert len(end["evaluations"]) == len(told)
    assert recorded == pytest.approx(told, rel=1e-6)
    assert end["final_loss"] == recorded[6, "validation"]
    assert end["best_loss"] == min(loss for (_, on), loss in recorded.items() if on == "validation")
    assert end["train_loss"]["lm loss"] == pytest.approx(outcome.losses[-1], rel=1e-6)
    assert end["started"] <= end["updated"]
    assert not list((folder / "transfer").glob("*.tmp"))
    assert json.loads((folder / "transfer" / "run.json").read_text()) == end


def test_hyperparameters_json(finished: tuple[Path, Outcome, str]) -> None:
    folder, outcome, _ = finished
    content = json.loads((folder / "transfer" / "hyperparameters.json").read_text())
    assert (content["rule"], content["exponents"], content["iteration"]) == ("sqrt", [0.5, 0.5], 0)
    assert content["base"] == {"hidden_size": 8, "ffn_hidden_size": 64}
    found = {entry["name"]: entry for entry in content["parameters"]}
    assert found.keys() == outcome.checksums.keys()
    matrix = found["decoder.layers.1.mlp.linear_fc2.weight"]
    assert (matrix["class"], matrix["shape"], matrix["fan_in"], matrix["base_fan_in"]) == ("matrix", [32, 128], 128, 64)
    for name, entry in found.items():
        if name.endswith("linear_fc2.weight"):
            label = "matrix_m2"
        elif re.search(r"linear_\w+\.weight$", name):
            label = "matrix_m4"
        else:
            label = "embedding" if "embedding" in name else "vector"
        a, b = CLASSES[label]
        assert (entry["lr"], entry["weight_decay"]) == pytest.approx((PEAK * a, DECAY * b), rel=1e-12), name
        assert entry["m"] == {"matrix_m2": 2.0, "matrix_m4": 4.0}.get(label, 1.0)
        assert entry["eps"] == 1e-8


def test_pipeline_stages_write_every_file_once(pool: Pool, tmp_path: Path) -> None:
    """The first rank has the hyperparameters of all stages; the last one has the losses and Megatron's writers."""
    stages = 2
    argv = [*FLAGS, "--pipeline-model-parallel-size", str(stages), "--tensorboard-dir", str(tmp_path)]
    outcome = pool.run(train, ranks=stages, argv=argv, steps=STEPS, hooks=Recorded(tmp_path / "transfer"))[0]
    assert sorted(path.name for path in (tmp_path / "transfer").iterdir()) == ["hyperparameters.json", "run.json"]
    end = json.loads((tmp_path / "transfer" / "run.json").read_text())
    assert (end["status"], end["iteration"], end["layout"]["pipeline"]) == ("finished", STEPS, stages)
    assert [(entry["iteration"], entry["set"]) for entry in end["evaluations"]] == [
        (2, "validation"),
        (4, "validation"),
        (6, "validation"),
        (6, "test"),
    ]
    assert end["arguments"]["rank"] == stages - 1
    assert end["train_loss"]["lm loss"] == pytest.approx(outcome.losses[-1], rel=1e-6)
    content = json.loads((tmp_path / "transfer" / "hyperparameters.json").read_text())
    assert {entry["name"] for entry in content["parameters"]} == outcome.checksums.keys()
    assert {
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.1.mlp.linear_fc1.weight",
    } <= outcome.checksums.keys()
    found = scalars(tmp_path)
    assert [step for step, _ in found["lr/matrix_m4"]] == list(range(1, STEPS + 1))
    shown = [[line for line in text.splitlines() if "| lr / weight decay:" in line] for text in pool.printed]
    assert [len(lines) for lines in shown] == [0, STEPS]


def test_resume_keeps_what_was_before_the_checkpoint(pool: Pool, tmp_path: Path) -> None:
    def run(steps: int, *flags: str) -> dict[str, Any]:
        save = ["--save", str(tmp_path), "--save-interval", "2"]
        pool.run(train, argv=[*LONGER, *save, *flags], steps=steps, hooks=Recorded(tmp_path / "transfer"))
        content: dict[str, Any] = json.loads((tmp_path / "transfer" / "run.json").read_text())
        return content

    stopped = run(4)
    assert (stopped["status"], stopped["iteration"]) == ("stopped", 4)
    assert [entry["iteration"] for entry in stopped["evaluations"]] == [2, 4]
    # Back to iteration 2: the evaluation at 4 was of a future that will not be.
    resumed = run(3, "--load", str(tmp_path), "--ckpt-step", "2")
    assert resumed["evaluations"] == stopped["evaluations"][:1]
    assert resumed["iteration"] == 3
    hyperparameters = json.loads((tmp_path / "transfer" / "hyperparameters.json").read_text())
    assert hyperparameters["iteration"] == 2
    # Another start from the beginning begins another record.
    anew = run(1)
    assert anew["evaluations"] == []
    assert anew["iteration"] == 1


class Failing(Recorded):
    """Breaks in the third step."""

    def stepped(self, run: Run, iteration: int, losses: dict[str, float]) -> None:
        if iteration == 3:
            raise RuntimeError("out of luck")


def test_a_run_that_breaks_says_so(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="out of luck"):
        pool.run(train, argv=[*LONGER, "--metrics-dir", str(tmp_path)], steps=STEPS, hooks=Failing(tmp_path))
    content = json.loads((tmp_path / "run.json").read_text())
    assert (content["status"], content["iteration"]) == ("failed", 2)
    assert [entry["iteration"] for entry in content["evaluations"]] == [2]
    assert math.isfinite(content["final_loss"])


def test_without_a_folder_nothing_is_written_and_somebody_is_told(pool: Pool, tmp_path: Path) -> None:
    pool.run(in_folder, folder=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert (
        "> no --metrics-dir, --save or --tensorboard-dir: hyperparameters.json and run.json not written"
        in (pool.printed[0])
    )


def in_folder(folder: str) -> None:
    """In a worker: one step of training with the folder as the current one."""
    import os

    os.chdir(folder)
    train([*FLAGS, "--eval-iters", "0"], steps=1, hooks=Recorded(Path(folder)))


# --- without the trainer ---------------------------------------------------------------------------------------------

ARGS = argparse.Namespace(train_iters=10, save=None)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "{}", '{"evaluations": 1}', '{"evaluations": [1]}', '{"evaluations": [{}]}', "[" * 10**5],
)
def test_a_damaged_run_json_is_replaced_and_that_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    from megatron_patch.files.run_json import RunRecord

    path = tmp_path / "run.json"
    path.write_text(content)
    RunRecord(str(tmp_path), ARGS, {}, 5)
    assert capsys.readouterr().err == f"WARNING: {path}: damaged; the evaluations before iteration 5 are lost\n"
    assert json.loads(path.read_text())["evaluations"] == []


def test_updates_that_cannot_be_written_are_made_up_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One warning; the file stays as it was, whole, and the next update that succeeds has everything."""
    from megatron_patch.files.run_json import RunRecord

    record = RunRecord(str(tmp_path), ARGS, {}, 0)
    path = tmp_path / "run.json"
    before = path.read_bytes()
    (tmp_path / "run.json.tmp").symlink_to("/dev/full")
    record.evaluated(2, "validation", {"lm loss": 3.0})
    (tmp_path / "run.json.tmp").symlink_to("/dev/full")
    record.evaluated(4, "validation", {"lm loss": 2.0})
    assert path.read_bytes() == before
    assert capsys.readouterr().err == (
        f"WARNING: {path}: No space left on device; training goes on, and the next update writes all of it\n"
    )
    record.ended("finished")
    content = json.loads(path.read_text())
    assert [e["iteration"] for e in content["evaluations"]] == [2, 4]
    assert (content["status"], content["best_loss"]) == ("finished", 2.0)
    assert capsys.readouterr().err == f"> {path}: written again; nothing is missing\n"


def test_a_folder_that_cannot_be_written_is_a_mistake_at_the_start(tmp_path: Path) -> None:
    from megatron_patch.errors import ConfigError
    from megatron_patch.files.run_json import RunRecord
    from megatron_patch.upstream.record import writing

    (tmp_path / "run.json.tmp").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"--metrics-dir .*No space left on device.*make room") as caught:
        writing(str(tmp_path), lambda: RunRecord(str(tmp_path), ARGS, {}, 0))
    assert "\n" not in str(caught.value)
