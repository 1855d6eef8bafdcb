"""A run with Megatron-Bridge's own `pretrain` trains and measures what plain Megatron with our flags does.

Needs the environment that `.ci/test_bridge` makes; everywhere else the whole file is skipped.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.theory.schedules import exp_increasing
from tests.bridge.training import LLAMA
from tests.support.layouts import DISTRIBUTED, METRICS, SAMPLED, STEPS, TP2, differences
from tests.support.monitored import read_lines
from tests.support.pool import ROOT, Pool
from tests.support.reference import scatter_weights
from tests.support.training import TINY, Patched, Run, global_names, train

BRIDGE = find_spec("megatron") is not None and find_spec("megatron.bridge") is not None
pytestmark = pytest.mark.skipif(not BRIDGE, reason="needs Megatron-Bridge: make test-bridge")

RULE = {"width_scaling": "sqrt", "base_hidden_size": 8, "base_ffn_hidden_size": 16, "vector_lr": 0.02}
FIELDS = ("lr", "max_lr", "min_lr", "weight_decay", "eps")


def bridge(ranks: int = 1, **options: Any) -> list[dict[str, Any]]:
    """Train with Bridge on some ranks, each a process; return what happened on each (tests/bridge/training.py)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as opened:
        started, outputs = [], [opened.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
        for rank, output in enumerate(outputs):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONWARNINGS": "ignore",
            }
            command = [sys.executable, "-m", "tests.bridge.training", json.dumps(options)]
            # Bridge's saving leaves processes behind that would hold a pipe open: a file, and a session of their own.
            started.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            )
        codes, said = [process.wait() for process in started], []
        for process, output in zip(started, outputs, strict=True):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            output.seek(0)
            said.append(output.read())
    assert codes == [0] * ranks, "\n".join(text[-3000:] for text in said)
    return [json.loads(text.splitlines()[-1]) for text in said]


@dataclass
class Watched(Patched):
    """Plain Megatron with the patch, from the weights of the reference, and its live groups after each step."""

    def __post_init__(self) -> None:
        self.groups: list[dict[str, dict[str, float]]] = []

    def built(self, run: Run) -> None:
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config

        from megatron_patch.config import WidthConfig
        from megatron_patch.upstream.width.parameters import describe

        parameters = list(describe(run.model, get_model_config(run.model[0]), WidthConfig(), parallel_state))
        scatter_weights(parameters, run.optimizer, parallel_state, LLAMA.gated)

    def stepped(self, run: Run, iteration: int, losses: dict[str, float]) -> None:
        from megatron_patch.upstream.width.audit import live_groups

        names = {id(parameter): name for name, parameter in global_names(run.model).items()}
        self.groups.append(
            {
                names[id(p)]: {key: group.get(key) for key in FIELDS}
                for group, parameters in live_groups(run.optimizer)
                for p in parameters
            }
        )

    def result(self, run: Run) -> Any:
        return self.groups


def as_flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize("ranks", [1, 2], ids=["one", "tp2-distributed"])
def test_bridge_trains_what_plain_megatron_does(pool: Pool, tmp_path: Path, ranks: int) -> None:
    """The same LR, weight decay and eps of every parameter after every step, the same losses, the same metrics."""
    settings = {**RULE, "extra_warmup": "decay-away", "alignment_interval": 1, "alignment_tokens": SAMPLED}
    ours = bridge(
        ranks,
        tp=ranks,
        distributed=ranks > 1,
        optimizer={"min_lr": 1e-3},
        settings={**settings, "metrics_dir": str(tmp_path / "bridge"), "audit_interval": 1},
        decay="cosine",
    )
    layout = [*TP2, *DISTRIBUTED] if ranks > 1 else []
    schedule = "--min-lr 1e-3 --lr-decay-style cosine --lr-decay-iters 100 --lr-warmup-iters 0".split()
    flags = as_flags({**settings, "metrics_dir": str(tmp_path / "megatron")})
    plain = pool.run(
        train, ranks=ranks, argv=[*TINY, *LLAMA.flags(), *schedule, *flags, *layout], steps=STEPS, hooks=Watched()
    )
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine["error"] is None
        assert mine["losses"] == pytest.approx(theirs.losses, rel=1e-6)
        assert len(mine["losses"]) == STEPS
        assert mine["groups"] == theirs.extra
    matrix = ours[0]["groups"][0]["decoder.layers.0.mlp.linear_fc1.weight"]
    assert matrix["max_lr"] == pytest.approx(1e-2 / 2), "not Megatron's own groups on both sides: m = 32 / 8, sqrt"
    for name in ("alignment", "equilibrium", "sublayers"):
        lines, expected = read_lines(tmp_path / "bridge", name), read_lines(tmp_path / "megatron", name)
        assert lines.keys() == expected.keys()
        for key, line in lines.items():
            for field, value in expected[key].items():
                if field.startswith("predicted"):  # it starts at the weights before the test set those of the reference
                    continue
                assert line[field] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), (
                    key,
                    field,
                )
    tables = [
        json.loads((tmp_path / side / "hyperparameters.json").read_text(encoding="utf-8"))
        for side in ("bridge", "megatron")
    ]
    assert tables[0] == tables[1]


def test_every_metric_is_that_of_full_matrices_in_float64(tmp_path: Path) -> None:
    settings = {"alignment_interval": 1, "alignment_tokens": SAMPLED, "spectral_interval": 1}
    (told, _) = bridge(2, tp=2, distributed=True, settings={**settings, "metrics_dir": str(tmp_path)}, evaluations=1)
    assert told["error"] is None
    worst = differences(LLAMA, read_lines(tmp_path), data_ranks=1)
    assert max(worst[metric][0] for metric in METRICS) < 1e-5, worst
    assert worst["top_singular_value"][0] < 1e-3, worst
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert (record["status"], record["layout"]["tensor"]) == ("finished", 2)
    assert record["train_loss"]["lm loss"] == pytest.approx(told["losses"][-1])
    assert [entry["set"] for entry in record["evaluations"]] == ["validation", "test"]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """To the last bit, at TP 2 with the distributed optimizer; so are its metrics, whose file is cut back."""
    settings = {**RULE, "extra_warmup": "exp", "extra_warmup_iters": 8, "alignment_interval": 1}
    run = {"tp": 2, "distributed": True, "train_iters": 4, "save_interval": 2}
    whole, again = str(tmp_path / "whole"), str(tmp_path / "again")
    first, _ = bridge(2, **run, save=whole, settings={**settings, "metrics_dir": f"{whole}/m"})
    assert first["error"] is None
    Path(again).mkdir()
    os.rename(f"{whole}/iter_0000002", f"{again}/iter_0000002")
    os.rename(f"{whole}/m", f"{again}/m")
    kept = {name: read_lines(f"{again}/m", name) for name in ("alignment", "equilibrium", "sublayers")}
    second, _ = bridge(
        2, **run, load=f"{again}/iter_0000002", save=again, settings={**settings, "metrics_dir": f"{again}/m"}
    )
    assert second["error"] is None
    assert second["losses"] == first["losses"][2:]
    assert second["groups"] == first["groups"][2:]
    matrix = "decoder.layers.0.mlp.linear_fc1.weight"
    # The LR of the coming step, number 3 and 4 from 0: base * 4**-0.5 * f_t.
    expected = [1e-2 / 2 * exp_increasing(t, 8, 4.0) for t in (3, 4)]
    assert [groups[matrix]["lr"] for groups in second["groups"]] == pytest.approx(expected)
    assert {name: read_lines(f"{again}/m", name) for name in kept} == kept


def test_another_rule_is_refused_before_anything_is_loaded_and_so_is_a_run_without_the_callbacks(
    tmp_path: Path,
) -> None:
    save = str(tmp_path / "save")
    (first,) = bridge(train_iters=1, save=save, settings=RULE)
    assert first["error"] is None
    (other,) = bridge(train_iters=2, load=save, settings={**RULE, "width_scaling": "independent"})
    kind, message = other["error"]
    assert kind == "ConfigError"
    assert message.startswith(f"--load {save}: expected the hyperparameters of the checkpoint")
    assert "--width-scaling: sqrt -> independent" in message
    (forgotten,) = bridge(train_iters=1, settings=RULE, forget_callbacks=True)
    assert forgotten["error"][0] == "AuditError"
    assert "pretrain(cfg, forward_step, callbacks=callbacks)" in forgotten["error"][1]


def test_an_optimizer_that_was_changed_is_found_before_the_first_step() -> None:
    (told,) = bridge(train_iters=1, settings=RULE, tamper=True)
    kind, message = told["error"]
    assert (kind, told["losses"]) == ("AuditError", [])
    assert "the optimizer has max_lr" in message


def test_megatrons_own_mup_scales_the_lr_and_the_rule_adds_the_weight_decay() -> None:
    """m = 4: Megatron divides the matrices' LR and eps by 4; the rule multiplies their weight decay by 4."""
    (told,) = bridge(
        train_iters=1,
        settings={"width_scaling": "independent", "base_hidden_size": 8, "base_ffn_hidden_size": 12},
        model={"use_mup": True, "mup_base_hidden_size": 8},
        optimizer={"adam_eps": 1e-8},
    )
    assert told["error"] is None
    groups = told["groups"][0]
    matrix = groups["decoder.layers.1.mlp.linear_fc2.weight"]
    assert [matrix[key] for key in ("max_lr", "weight_decay", "eps")] == pytest.approx([1e-2 / 4, 0.1 * 4, 1e-8 / 4])
    vector = groups["decoder.final_layernorm.weight"]
    assert [vector[key] for key in ("max_lr", "weight_decay", "eps")] == pytest.approx([1e-2, 0.0, 1e-8])
