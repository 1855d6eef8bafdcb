"""The worked example in short: `launch/sweep_example.sh --quick`, from nothing to the tuned config and the report."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_patch.files.yaml_flags import load_yaml
from megatron_patch.runs.trial import read_csv

ROOT = Path(__file__).parents[2]


def test_the_short_example_ends_with_a_config_and_a_report(tmp_path: Path) -> None:
    for folder in ("configs", "launch", "tools"):  # so that nothing is written into this checkout
        shutil.copytree(ROOT / folder, tmp_path / folder)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "launch/sweep_example.sh", "--quick"],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    output = tmp_path / "runs" / "sweep-example-quick"
    trials = read_csv(str(output / "trials.csv"))
    assert sorted((t.hidden_size, math.log2(t.lr), t.rule) for t in trials) == [
        *((32, e, "none") for e in (-8, -6, -4)),
        *((64, e, "independent") for e in (-8, -6, -4)),
    ]
    assert all(1 < t.loss < math.log(1024) + 1 for t in trials)  # between a good model's and an untrained one's
    written = load_yaml(str(output / "target.yaml"))
    assert 2**-8 <= written["lr"] <= 2**-4
    assert written["base-hidden-size"] == 32
    assert "Transfer report card" in (output / "report.html").read_text()
    assert (output / "report.png").stat().st_size > 10_000
