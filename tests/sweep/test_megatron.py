"""A sweep of two trainings by the real Megatron on CPU, one of which diverges."""

import json
import math
import subprocess
import sys
from pathlib import Path

from megatron_patch.data.corpus import open_corpus
from megatron_patch.data.preprocess import preprocess
from megatron_patch.data.tokenizer import load_tokenizer
from megatron_patch.runs.read import read_trials

ROOT = Path(__file__).parents[2]
SWEEP = """
config: {root}/configs/example_proxy_w32.yaml
output: out
set:
  data-path: data
  tokenizer-model: {model}
  data-cache-path: "{{folder}}/cache"
  weight-decay: 0
  train-iters: 4
  lr-decay-iters: 4
  lr-warmup-iters: 0
  eval-interval: 4
  eval-iters: 1
  log-interval: 1
environment: {{OMP_NUM_THREADS: 1}}
grid: {{lr: [0.0078125, 1.0e+30]}}
"""


def test_one_finishes_and_one_diverges(model: str, jsonl: str, tmp_path: Path) -> None:
    """Megatron's own check for NaN ends the second one; it is a result, not an accident."""
    preprocess(open_corpus(jsonl), load_tokenizer(model), str(tmp_path / "data"), append_eod=True)
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(root=ROOT, model=model))
    words = [sys.executable, str(ROOT / "tools" / "sweep.py"), "sweep.yaml", "--workers", "2"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False)

    assert done.returncode == 0, done.stderr
    assert "2 trials: 1 finished, 1 diverged" in done.stdout
    good, diverged = read_trials(str(tmp_path / "out" / "trials.csv"))
    assert (good.lr, good.hidden_size, good.steps, good.seed, good.rule) == (2**-7, 32, 4, 1, "none")
    assert 5 < good.loss < math.log(1024) + 1
    assert (diverged.lr, diverged.diverged) == (1e30, True)
    folder = tmp_path / "out" / "trials" / "lr=1e+30"
    record = json.loads((folder / "transfer" / "run.json").read_text())
    assert record["status"] == "diverged"
    assert math.isfinite(record["train_loss"]["lm loss"]), "Megatron stops before it logs the NaN"
    assert "Unexpected result nan" in (folder / "log.txt").read_text()
    assert sorted(p.name for p in folder.iterdir()) == ["cache", "config.yaml", "log.txt", "tensorboard", "transfer"]
