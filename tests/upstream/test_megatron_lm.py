"""Megatron-LM's own scripts, untouched, through `megatron_patch run`, against the same scripts without this package.

Runs where MEGATRON_LM_DIR names a checkout of Megatron-LM core_v0.19.0 (docs/compatibility.md says how to get one); a
folder with its top-level scripts alone is enough, they then use the installed Megatron.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.pool import ROOT

CHECKOUT = os.environ.get("MEGATRON_LM_DIR", "")
pytestmark = pytest.mark.skipif(
    not CHECKOUT,
    reason="MEGATRON_LM_DIR is not set: Megatron-LM's own scripts were not run (see docs/compatibility.md)",
)

FLAGS = (
    "--cpu --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 0.01 --min-lr 0 --lr-decay-style linear "
    "--lr-warmup-iters 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --eval-iters 1 "
    "--eval-interval 100 --log-interval 1 --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --position-embedding-type rope --weight-decay 0.1 "
    "--tensor-model-parallel-size 2 --no-rope-fusion"
).split()
# Two Mamba layers, attention, MLP. Upstream's spec, in which the CPU platform has put layers that need no GPU.
HYBRID = (
    "--hybrid-layer-pattern M*-M --spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec "
    "--mamba-head-dim 16 --mamba-state-dim 8 --mamba-num-groups 2"
).split()
# At hidden size 16 Megatron would make linear_fc1 0 wide, in whole 64s.
RULE = "--width-scaling sqrt --base-hidden-size 16 --base-ffn-hidden-size 32".split()
# The same script on the same CPU platform without this package's hooks; of those only the one that makes no `make`.
PLAIN = """
import runpy, sys
sys.path[:0] = [sys.argv[1], {root!r}]
from megatron_patch.upstream.cpu.platform import activate, cpu_arguments
activate()
from megatron.core.datasets import utils
from megatron_patch.upstream.datasets import skip_compile_helpers
utils.compile_helpers = skip_compile_helpers(utils.compile_helpers)
script, words = sys.argv[2], [word for word in sys.argv[3:] if word != "--cpu"]
sys.argv = [script, *cpu_arguments(words)[0]]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the scripts and the Megatron beside them, with the dataset helpers that the wheel has compiled."""
    found = Path(CHECKOUT)
    assert (found / "pretrain_gpt.py").is_file(), f"MEGATRON_LM_DIR {found} has no pretrain_gpt.py"
    copy = tmp_path_factory.mktemp("megatron-lm")
    for script in found.glob("*.py"):
        shutil.copy2(script, copy)
    if (found / "megatron").is_dir():
        shutil.copytree(found / "megatron", copy / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
        code = "from megatron.core.datasets import helpers_cpp; print(helpers_cpp.__file__)"
        compiled = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
        shutil.copy2(compiled.stdout.strip(), copy / "megatron" / "core" / "datasets")
    return copy


def start(checkout: Path, words: list[str], cwd: Path) -> str:
    """Run `words` on two ranks under torchrun and return what was printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    ended = subprocess.run(
        [*launcher, *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
    return ended.stdout


def through_run(checkout: Path, script: str, flags: list[str], cwd: Path) -> str:
    return start(checkout, ["-m", "megatron_patch", "run", str(checkout / script), *flags], cwd)


def directly(checkout: Path, script: str, flags: list[str], cwd: Path) -> str:
    plain = cwd / "plain.py"
    plain.write_text(PLAIN.format(root=str(ROOT)))
    return start(checkout, [str(plain), str(checkout), str(checkout / script), *flags], cwd)


def losses(printed: str) -> list[str]:
    found = re.findall(r"lm loss: (\S+) \|.*?grad norm: (\S+) \|", printed)
    assert len(found) == 4
    return [*map(str, found), *re.findall(r"lm loss value: (\S+) \|", printed)]


def hyperparameters(folder: Path) -> dict[str, dict[str, Any]]:
    return {p["name"]: p for p in json.loads((folder / "hyperparameters.json").read_text())["parameters"]}


@pytest.mark.parametrize(("script", "more"), [("pretrain_gpt.py", []), ("pretrain_hybrid.py", HYBRID)])
def test_same_losses_without_and_with_the_package(checkout: Path, tmp_path: Path, script: str, more: list[str]) -> None:
    """At defaults, and with a rule at the base width: as Megatron prints them, losses and gradient norms are equal."""
    flags = [*FLAGS, *more]
    plain = losses(directly(checkout, script, flags, tmp_path))
    assert losses(through_run(checkout, script, flags, tmp_path)) == plain
    identity = "--width-scaling independent --base-hidden-size 64".split()
    assert losses(through_run(checkout, script, [*flags, *identity], tmp_path)) == plain


def test_rule_in_pretrain_gpt(checkout: Path, tmp_path: Path) -> None:
    printed = through_run(checkout, "pretrain_gpt.py", [*FLAGS, *RULE, "--metrics-dir", str(tmp_path)], tmp_path)
    assert len(losses(printed)) > 4
    for name, p in hyperparameters(tmp_path).items():
        scaled = p["class"] in ("matrix", "output")
        assert (p["m"], p["lr"]) == ((4.0, 0.005) if scaled else (1.0, 0.01)), name


def test_rule_in_pretrain_mamba(checkout: Path, tmp_path: Path) -> None:
    """`pretrain_mamba.py` hands over to `pretrain_hybrid.py`; every parameter of a Mamba layer has its class."""
    flags = [*FLAGS, *HYBRID, *RULE, "--metrics-dir", str(tmp_path)]
    through_run(checkout, "pretrain_mamba.py", flags, tmp_path)
    found = hyperparameters(tmp_path)
    mixer = {name: found[f"decoder.layers.0.mixer.{name}"] for name in MIXER}
    assert {name: (p["class"], p["fan_in"], p["m"], p["lr"], p["weight_decay"]) for name, p in mixer.items()} == MIXER


# (class, fan-in, m, LR, weight decay) by the rule sqrt at 4 times the base width. The convolution reads 4 points in
# time at any width.
MIXER = {
    "in_proj.weight": ("matrix", 64, 4.0, 0.005, 0.2),
    "out_proj.weight": ("matrix", 128, 4.0, 0.005, 0.2),
    "conv1d_weight": ("matrix", 4, 1.0, 0.01, 0.1),
    **dict.fromkeys(("conv1d_bias", "A_log", "D", "dt_bias", "norm.weight"), ("vector", 1, 1.0, 0.01, 0.0)),
}
