"""launch/pretrain.py, by this name and as pretrain_gpt.py: an ordinary Megatron script, run on CPU through `run`."""

import argparse
import ast
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "pretrain.py"
TINY = """
--cpu --mock-data --tokenizer-type NullTokenizer --vocab-size 255 --num-layers 2 --hidden-size 64
--num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 4
--train-iters 3 --lr-decay-iters 3 --lr 1e-2 --log-interval 1 --eval-iters 1 --eval-interval 100
--untie-embeddings-and-output-weights --swiglu --normalization RMSNorm --position-embedding-type rope
--disable-bias-linear
""".split()


def run(*arguments: str, ranks: int = 1, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    """Run the script on CPU; several ranks under torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    launcher = [*torchrun, "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "megatron_patch", "run", str(script), *TINY, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)


def test_knows_nothing_of_megatron_patch() -> None:
    imports = [
        node for node in ast.walk(ast.parse(SCRIPT.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = [
        name for node in imports for name in ([a.name for a in node.names] + [getattr(node, "module", None) or ""])
    ]
    assert [name for name in names if name.startswith("megatron_patch")] == []


def test_refused_flags_exist() -> None:
    """A name that Megatron renames would silently no longer be refused."""
    from megatron.training.arguments import add_megatron_arguments

    known = {action.dest for action in add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._actions}
    refused = re.search(r"^REFUSED = \((.*?)\)\.split", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert refused
    names = ast.literal_eval(f"({refused[1]})").split()
    assert len(names) == 9
    assert [name for name in names if name not in known] == []


@pytest.mark.parametrize(
    "parallel",
    [
        ["--tensor-model-parallel-size", "2"],
        ["--pipeline-model-parallel-size", "2"],
        # Mamba, attention, MLP; a predicted token on the last stage
        "--pipeline-model-parallel-size 2 --hybrid-layer-pattern M*-|*-/*- --mamba-head-dim 16 --mamba-state-dim 8 "
        "--mamba-num-groups 2".split(),
        ["--pipeline-model-parallel-size", "2", "--mtp-num-layers", "1"],
    ],
    ids=["tp2", "pp2", "hybrid-pp2-mtp", "pp2-mtp"],
)
def test_two_ranks_train(parallel: list[str], tmp_path: Path) -> None:
    """With a checkpoint at the end, and with nothing of Megatron replaced as in the pool of tests/support/pool.py."""
    done = run(*parallel, "--save", str(tmp_path), "--save-interval", "3", "--ckpt-format", "torch_dist", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(found) for found in re.findall(r"iteration +\d+/ +3 .*lm loss: (\S+)", done.stdout)]
    assert len(losses) == 3
    assert abs(losses[0] - math.log(256)) < 0.5, "an untrained model guesses"
    assert losses[2] < losses[0]
    predicted = re.findall(r"mtp_1 loss: (\S+)", done.stdout)
    assert len(predicted) == (3 if "mtp" in " ".join(parallel) or "/" in " ".join(parallel) else 0)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "3"


def test_refuses_what_it_would_do_half() -> None:
    done = run("--sft", script=SCRIPT.with_name("pretrain_gpt.py"))
    assert done.returncode == 2
    assert "--sft is not supported" in done.stdout
    assert "lm loss" not in done.stdout


def test_a_gpt_and_the_hybrid_model_of_the_same_weights() -> None:
    """From the same flags but the pattern, and from either name of the script: every printed digit."""

    def printed(*flags: str, script: str = "pretrain.py") -> list[tuple[str, str]]:
        done = run(*flags, "--width-scaling", "sqrt", "--base-hidden-size", "64", script=SCRIPT.with_name(script))
        assert done.returncode == 0, done.stderr[-2000:]
        return re.findall(r"lm loss: (\S+) \|.*?grad norm: (\S+) \|", done.stdout)

    gpt = printed(script="pretrain_gpt.py")
    assert len(gpt) == 3
    assert printed("--hybrid-layer-pattern", "*-*-") == gpt
