"""Param groups, scheduler and audit on megatron.core alone, at the version that is installed, against closed forms.

`make test-core` runs this at every version in `SUPPORTED_CORE`, each in an environment of its own.
"""

import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest

from megatron_patch.upstream.hooks import SUPPORTED_CORE
from tests.core.building import BASE_FFN, BASE_HIDDEN, BASE_LR, EPS, FFN, HIDDEN, MIN_LR, WEIGHT_DECAY
from tests.support.pool import ROOT


def job(**settings: Any) -> dict[str, Any]:
    """Run `tests.core.building` in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.core.building", json.dumps(settings)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def independent() -> dict[str, Any]:
    return job(rule="independent")


def multiplier(name: str) -> float:
    """m of a matrix by hand: its fan-in is the hidden size, but for the second layer of the MLP."""
    return FFN / BASE_FFN if ".linear_fc2." in name else HIDDEN / BASE_HIDDEN


def expected_class(name: str) -> str:
    if name.endswith(".bias") or "layernorm" in name:
        return "vector"
    return {"embedding": "embedding", "output_layer": "output"}.get(name.partition(".")[0], "matrix")


def factors(name: str) -> tuple[float, float]:
    """(LR, weight decay) of the rule `independent`, eta/m and m*lambda, in units of the base's."""
    kind = expected_class(name)
    if kind in ("matrix", "output"):
        return 1 / multiplier(name), multiplier(name)
    return 1.0, float(kind == "embedding")


def test_the_version_is_one_of_those(independent: dict[str, Any]) -> None:
    wanted = os.environ.get("MEGATRON_CORE_VERSION")
    assert not wanted or independent["version"].partition("+")[0] == wanted
    assert any(independent["version"].startswith(series + ".") for series in SUPPORTED_CORE)
    assert independent["training"] == [], "megatron.training is needed, which these versions do without"


def test_every_parameter_has_its_class(independent: dict[str, Any]) -> None:
    classes = independent["classes"]
    assert {name: expected_class(name) for name in classes} == classes
    assert (
        len(classes) == 2 * 12 + 2 + 2 + 1
    )  # per layer 4 matrices and as many biases, 2 norms; embeddings, norm, head


def test_param_groups(independent: dict[str, Any]) -> None:
    assert independent["live"].keys() == independent["classes"].keys()
    for name, live in independent["live"].items():
        lr, decay = factors(name)
        assert live["max_lr"] == pytest.approx(BASE_LR * lr, rel=1e-12), name
        assert live["min_lr"] == pytest.approx(MIN_LR * lr, rel=1e-12), name
        assert live["weight_decay"] == pytest.approx(WEIGHT_DECAY * decay, rel=1e-12), name
        assert live["eps"] == EPS


def test_schedule(independent: dict[str, Any]) -> None:
    """Linear to the peak at 20 samples, then linear to the minimum at 100; each group with its own peak and minimum."""
    assert independent["lrs"] == pytest.approx([0, 4 / 20, 8 / 20, 12 / 20, 16 / 20, 1], rel=1e-12)
    left = 1 - (24 - 20) / (100 - 20)
    for name, live in independent["live"].items():
        lr = factors(name)[0] * (MIN_LR + left * (BASE_LR - MIN_LR))
        assert live["lr"] == pytest.approx(lr, rel=1e-12), name


def test_weight_decay_is_what_happens(independent: dict[str, Any]) -> None:
    """A step without gradients multiplies a weight by 1 - lr * weight decay: by this rule, every matrix alike."""
    left = 1 - (24 - 20) / (100 - 20)
    shrink = 1 - (MIN_LR + left * (BASE_LR - MIN_LR)) * WEIGHT_DECAY
    for name, ratio in independent["shrunk"].items():
        assert ratio == pytest.approx(1.0 if expected_class(name) == "vector" else shrink, abs=2e-7), name


def test_resume(independent: dict[str, Any]) -> None:
    """Groups are told apart by the keys of this very version, so that each gets back what is its own."""
    keys = [tuple(key) for key in independent["keys"]]
    assert len(set(keys)) == len(keys)
    assert independent["resumed"] == independent["live"]


def test_audit_finds_a_wrong_group(independent: dict[str, Any]) -> None:
    assert "the optimizer has max_lr = " in independent["refusal"]
    assert "--width-scaling independent gives " in independent["refusal"]


def test_extra_warmup() -> None:
    """Eq. 14 on top of the schedule: m^(t/10 - 1), with t in optimizer steps of 4 samples."""
    found = job(rule="sqrt", warmup="exp", steps=12)
    m = HIDDEN / BASE_HIDDEN
    for t, factor in enumerate(found["lrs"]):
        samples = 4 * t
        part = samples / 20 if samples <= 20 else 1 - (samples - 20) / 80 * (1 - MIN_LR / BASE_LR)
        assert factor == pytest.approx(part * m ** min(0.0, t / 10 - 1), rel=1e-12)
    for name, live in found["live"].items():
        kind, m = expected_class(name), multiplier(name)
        scaled = kind in ("matrix", "output")
        assert live["max_lr"] == pytest.approx(BASE_LR / math.sqrt(m) if scaled else BASE_LR, rel=1e-12)
    assert found["resumed"] == found["live"]
