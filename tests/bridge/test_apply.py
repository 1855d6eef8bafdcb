"""What `megatron_patch.bridge.apply` refuses, and how: before anything is set up, all at once, a line each."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from tests.support.pool import ROOT

BRIDGE = find_spec("megatron") is not None and find_spec("megatron.bridge") is not None
needs_bridge = pytest.mark.skipif(not BRIDGE, reason="needs Megatron-Bridge: make test-bridge")

SQRT = {"width_scaling": "sqrt", "base_hidden_size": 8}
MUP = {"use_mup": True, "mup_base_hidden_size": 8}
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    # options of tests/bridge/training.py: what each line of the error begins with
    "nothing asked for": ({"settings": {}}, []),
    "right": ({"settings": SQRT}, []),
    "another name": ({"settings": {**SQRT, "widht_scaling": "sqrt"}}, ["widht_scaling given: expected a setting"]),
    "not for Bridge": ({"settings": {**SQRT, "cpu": True}}, ["cpu given: expected no such setting with"]),
    "another type": (
        {"settings": {"width_scaling": "sqrt", "base_hidden_size": "wide"}},
        ["--base-hidden-size wide: expected an integer"],
    ),
    "all at once": (
        {
            "settings": {"width_scaling": "sqrt", "extra_warmup": "exp", "alignment_interval": -1},
            "optimizer": {"lr": None},
        },
        [
            "--base-hidden-size not given: expected the hidden size of the proxy",
            "--extra-warmup-iters/--extra-warmup-fraction not given: expected exactly one",
            "--alignment-interval -1: expected an integer >= 0",
        ],
    ),
    "no folder": ({"settings": {"alignment_interval": 1}}, ["--metrics-dir not given: expected a folder"]),
    "no LR": ({"settings": SQRT, "optimizer": {"lr": None}}, ["--lr not given: expected a positive base"]),
    "no weight decay": (
        {"settings": SQRT, "no_decay": True},
        ["cfg.scheduler.start_weight_decay not given", "cfg.scheduler.end_weight_decay not given"],
    ),
    "adapters": ({"settings": SQRT, "peft": True}, ["cfg.peft LoRA: expected None"]),
    "muP and another LR": ({"settings": SQRT, "model": MUP}, ["--use-mup with --width-scaling sqrt: expected a rule"]),
    "muP of another base": (
        {"settings": {"width_scaling": "independent", "base_hidden_size": 16}, "model": MUP},
        ["--mup-base-hidden-size 8: expected the same as --base-hidden-size 16"],
    ),
    "muP": ({"settings": {"width_scaling": "independent", "base_hidden_size": 8}, "model": MUP}, []),
    "the class is gone": (  # last: it stays gone
        {"settings": SQRT, "without_door": True},
        ["megatron-bridge 0.6.2: megatron.bridge.training.optim:OptimizerParamScheduler"],
    ),
}


@needs_bridge
def test_what_is_wrong_is_told_at_once_and_nothing_is_changed() -> None:
    command = [sys.executable, "-m", "tests.bridge.refusing", json.dumps([options for options, _ in CASES.values()])]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for (case, (options, lines)), told in zip(CASES.items(), json.loads(ended.stdout.splitlines()[-1]), strict=True):
        if not lines:
            assert told["error"] is None, (case, told)
            # A run that asks for nothing keeps Bridge's own provider.
            assert (told["unchanged"], told["callbacks"]) == ((True, 0) if not options["settings"] else (False, 1)), (
                case
            )
            continue
        assert told["error"] is not None, case
        assert told["unchanged"], case
        found = told["error"][1].splitlines()
        assert len(found) == len(lines), (case, found)
        for line, beginning in zip(found, lines, strict=True):
            assert line.startswith(beginning), (case, line)


@pytest.mark.skipif(BRIDGE, reason="Megatron-Bridge is here")
def test_without_bridge_the_import_says_what_is_missing_in_one_line() -> None:
    command = [sys.executable, "-c", "import megatron_patch.bridge"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ.copy())
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: megatron_patch.bridge needs Megatron-Bridge 0.6")
    assert "(no module named megatron.bridge)" in last
    assert "pip install megatron-bridge==0.6.2" in last
