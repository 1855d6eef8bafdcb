"""The quickstart, shortened, on DeepSpeed's engine and on Megatron's optimizer: one script and config, the same run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.monitored import read_lines
from tests.support.pool import ROOT

SHORT = "--train-iters 4 --eval-interval 4 --eval-iters 1 --log-interval 1 --alignment-interval 2 --spectral-interval 4"
ENGINE = "--deepspeed --deepspeed-config configs/deepspeed/zero1.json"
NUMBERS = re.compile(r"iteration +(\d+)/ +4 .*? lm loss: (\S+) .*? grad norm: (\S+)")


def started(folder: Path, script: str, *words: str) -> str:
    """What a script of launch/ prints, started in a checkout of its own."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [f"launch/{script}", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_same_run_on_both_back_ends(tmp_path: Path) -> None:
    for name in ("launch", "tools", "configs", "megatron_patch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    engine = started(tmp_path, "quickstart.sh", *SHORT.split(), *ENGINE.split())
    assert "> DeepSpeed engine: ZeRO stage 1, torch's AdamW, fp32, gradients summed in fp32, micro batch 8" in engine
    made = tmp_path / "runs/quickstart"
    assert (made / "report.html").stat().st_size > 10_000
    assert (made / "report.png").exists()

    # The second half of the script once more, from the data that the first has made.
    data = ["--data-path", "runs/quickstart/stdlib", "--data-cache-path", "runs/quickstart/cache"]
    data += ["--tokenizer-model", "runs/quickstart/tokenizer.model", "--split", "96,2,2"]
    words = ["--num-gpus", "2", "--config", "configs/quickstart_proxy.yaml", *data, *SHORT.split()]
    megatron = started(tmp_path, "pretrain.sh", *words, "--save", "runs/megatron", "--metrics-dir", "runs/megatron")
    assert "DeepSpeed engine" not in megatron

    (ours, theirs) = ([[float(n) for n in line] for line in NUMBERS.findall(text)] for text in (engine, megatron))
    assert len(theirs) == 4
    assert theirs[3][1] < theirs[0][1]
    assert ours == [pytest.approx(line, rel=1e-6) for line in theirs]
    folders = (made, tmp_path / "runs/megatron")
    tables = [json.loads(next(folder.rglob("hyperparameters.json")).read_text()) for folder in folders]
    assert tables[0] == tables[1]
    engines, megatrons = (read_lines(next(folder.rglob("alignment.jsonl")).parent) for folder in folders)
    assert len(megatrons) > 50
    assert engines.keys() == megatrons.keys()
    for place, line in megatrons.items():
        for key in ("alignment_ratio", "relative_update", "weight_norm"):
            assert engines[place][key] == pytest.approx(line[key], rel=1e-5), (place, key)
