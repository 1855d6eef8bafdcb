"""The code of docs/plain.md runs as it stands there, and does what the page says."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.errors import AuditError
from tests.support.pool import ROOT, Pool

PAGE = ROOT / "docs/plain.md"
SCRIPTS = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))


def start(folder: Path, name: str, *arguments: str) -> str:
    """What a script of the page prints."""
    script = folder / name
    script.write_text(SCRIPTS[name])
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_every_script_of_the_page_is_run() -> None:
    assert sorted(SCRIPTS) == ["plain_deepspeed.py", "plain_loop.py", "plain_trainer.py"]
    assert PAGE.read_text().count("```python") == len(SCRIPTS)


def test_a_loop_of_your_own(tmp_path: Path) -> None:
    printed = start(tmp_path, "plain_loop.py")
    (shown,) = re.findall(r"It prints first:\n\n```\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert printed.startswith(shown)
    ratios = [float(ratio) for ratio in re.findall(r"alignment ratio ([\d.]+)", printed)]
    assert len(ratios) == 2 * 4 and min(ratios) > 0
    assert float(printed.split()[-1]) < 5.5  # ln 256 = 5.545 without learning anything


def run_script(source: str, stage: int) -> None:
    import deepspeed

    # Serves inference only; without it nothing has to be compiled.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sys.argv = ["plain_deepspeed.py", str(stage)]
    exec(compile(source, "plain_deepspeed.py", "exec"), {"__name__": "__main__"})  # noqa: S102 - the page's own code


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed(stage: int, pool: Pool) -> None:
    pool.run(run_script, ranks=2, source=SCRIPTS["plain_deepspeed.py"], stage=stage, env={"DS_ACCELERATOR": "cpu"})
    lines = [line for line in pool.printed[0].splitlines() if re.match(r"(matrix|output|vector)\S* +lr", line)]
    # first has the fan-in 8 at every width. m = 4: LR / 2, weight decay * 2.
    assert [" ".join(line.split()[:6]) for line in lines] == [
        "matrix_m1 lr 0.01 weight decay 0.1",
        "vector lr 0.01 weight decay 0",
        "matrix_m4 lr 0.005 weight decay 0.2",
        "output_m4 lr 0.005 weight decay 0.2",
    ]
    updates = [float(value) for value in re.findall(r"relative update ([\d.]+)", pool.printed[0])]
    assert len(updates) == 3 and min(updates) > 0
    assert "relative update" not in pool.printed[1]


def test_hugging_faces_trainer_and_its_resume(tmp_path: Path) -> None:
    whole = start(tmp_path, "plain_trainer.py", "whole")
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]
    for step in (6, 12):
        for name in [*names, "lm_head"]:
            assert re.search(rf"^{step} {name} relative update 0\.\d+$", whole, re.MULTILINE), (step, name)
    assert re.search(r"^matrix_m4 +lr 0.0025  weight decay 0.4  .*q_proj", whole, re.MULTILINE)
    # The second half again, from the checkpoint in its middle: the same measurement of step 12, and the same groups.
    (tmp_path / "whole/checkpoint-12").rename(tmp_path / "checkpoint-12")
    again = start(tmp_path, "plain_trainer.py", "whole", "resume")
    assert "\n6 " not in again
    second_half = [line for line in whole.splitlines() if line.startswith("12 ") or " lr " in line]
    assert [line for line in again.splitlines() if line.startswith("12 ") or " lr " in line] == second_half
    assert len(second_half) == 15 + 4


def on_an_engine(source: str, folder: str, stage: int) -> None:
    """The script of the Trainer, with `deepspeed=` in its arguments and no step saved."""
    import deepspeed
    import transformers

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    plain = transformers.TrainingArguments

    def arguments(**given: Any) -> Any:
        return plain(**{**given, "save_strategy": "no", "deepspeed": config})

    transformers.TrainingArguments = arguments
    sys.argv = ["plain_trainer.py", folder]
    exec(compile(source, "plain_trainer.py", "exec"), {"__name__": "__main__"})  # noqa: S102 - the page's own code


@pytest.mark.parametrize("stage", [2, 3])
def test_hugging_faces_trainer_on_deepspeeds_engine(stage: int, pool: Pool, tmp_path: Path) -> None:
    source = SCRIPTS["plain_trainer.py"]
    pool.run(on_an_engine, ranks=2, source=source, folder=str(tmp_path), stage=stage, env={"DS_ACCELERATOR": "cpu"})
    # A progress bar may stand on the same line.
    measured = [re.findall(r"\d+ (?:model\.\S+|lm_head) relative update [\d.]+", text) for text in pool.printed]
    assert measured[0] == measured[1]
    assert len(measured[0]) == 2 * 15
    for text in pool.printed:
        assert dict(re.findall(r"(embedding|vector|matrix_m4|output_m4) +lr ([\d.]+)", text)) == {
            "embedding": "0.01", "vector": "0.01", "matrix_m4": "0.0025", "output_m4": "0.0025"
        }  # fmt: skip


GIVEN_INSTEAD = {
    "class WidthTrainer(Trainer):": "class WidthTrainer(Trainer):\n    pass\n\n\nclass Unused(Trainer):",
    "trainer = WidthTrainer(": "net = llama(64)\n"
    "planned = width_groups(net, base=llama(16), rule='sqrt', lr=0.1, weight_decay=0.1)\n"
    "trainer = WidthTrainer(\n    optimizers=(torch.optim.AdamW(planned), None),",
    "model=llama(64)": "model=net",
}
"""From the page's script to one that gives the Trainer an optimizer."""


def refused_on_an_engine(source: str, folder: str) -> str:
    with pytest.raises(AuditError) as caught:
        on_an_engine(source, folder, 2)
    return str(caught.value)


def test_an_optimizer_that_the_trainer_throws_away_is_missed(pool: Pool, tmp_path: Path) -> None:
    source = SCRIPTS["plain_trainer.py"]
    for part, other in GIVEN_INSTEAD.items():
        assert source.count(part) == 1
        source = source.replace(part, other)
    (said,) = pool.run(refused_on_an_engine, source=source, folder=str(tmp_path), env={"DS_ACCELERATOR": "cpu"})
    assert said.startswith("group 0 (without a name), model.embed_tokens.weight: the optimizer has weight_decay = 0,")
