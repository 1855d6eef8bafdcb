"""A universal checkpoint through launch/pretrain.sh: saved by two data-parallel ranks, loaded by one and by four."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.pool import ROOT
from tests.support.training import TINY

STEPS, HALF = 6, 3
RULE = "--width-scaling sqrt --base-hidden-size 16 --vector-lr 2e-2 --weight-decay 0.1 --extra-warmup decay-away"
# Steps of four sequences in micro batches of one: four, two and one for one, two and four ranks.
BATCH = "--micro-batch-size 1 --global-batch-size 4 --clip-grad 0.5 --mock-data"


def flags(words: list[str]) -> dict[str, str | bool]:
    """Words of a command line as the keys of a YAML file."""
    found: dict[str, str | bool] = {"cpu": True}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word[2:]] = True if following.startswith("--") else following
    return found


def losses(folder: Path, ranks: int, ds: str, *more: str) -> dict[int, float]:
    """Start as a user does, from `folder`; the loss of each iteration, as the log has it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    script = [str(ROOT / "launch/pretrain.sh"), "--num-gpus", str(ranks), "--master-port", str(port)]
    done = subprocess.run(
        [*script, "--config", "run.yaml", "--deepspeed", "--deepspeed-config", ds, *more],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.findall(r"iteration +(\d+)/ +\d+ .*? lm loss: (\S+)", done.stdout)
    return {int(iteration): float(loss) for iteration, loss in found}


@pytest.mark.parametrize("stage", [1, 3])
def test_losses_go_on_at_another_number_of_ranks(stage: int, tmp_path: Path) -> None:
    words = [*TINY, *RULE.split(), *BATCH.split(), "--train-iters", str(STEPS)]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(flags(words)))
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    (tmp_path / "first.json").write_text(
        json.dumps({"zero_optimization": zero, "checkpoint": {"load_universal": True}})
    )
    two = losses(tmp_path, 2, "ds.json", "--save", "save", "--save-interval", str(HALF))
    assert list(two) == list(range(1, STEPS + 1))
    saved = f"save/iter_{HALF:07d}"
    convert = ["--input_folder", f"{saved}/deepspeed", "--output_folder", f"{saved}/universal"]
    subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *convert],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    for ranks in (1, 4):
        gone_on = losses(tmp_path, ranks, "first.json", "--load", "save", "--ckpt-step", str(HALF))
        assert list(gone_on) == list(range(HALF + 1, STEPS + 1))
        # Megatron forgets nothing after the first iteration that it logs: the second is the mean of both.
        gone_on[HALF + 2] = 2 * gone_on[HALF + 2] - gone_on[HALF + 1]
        assert gone_on == pytest.approx({i: two[i] for i in gone_on}, abs=4e-6), ranks
