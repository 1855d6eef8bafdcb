"""The argument sets of Megatron-LM's functional tests and examples, as command lines that `explain` can be given."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FAMILIES = ("gpt", "moe", "hybrid", "mixtral", "nemotron")
# Files of NVIDIA's machines, and what starts from them.
LEFT_OUT = frozenset(
    "--data-path --vocab-file --merge-file --tokenizer-model --load --save --data-cache-path --tensorboard-dir "
    "--pretrained-checkpoint --kd-teacher-load --per-dataset-sequences-path --train-data-path --wandb-save-dir "
    "--use-checkpoint-args --auto-detect-ckpt-format --finetune --export-kd-teacher-load --export-kd-cfg "
    "--dist-ckpt-strictness --perform-initialization --valid-data-path --test-data-path --split --blend".split()
)


@dataclass(frozen=True)
class Functional:
    """One argument set."""

    name: str
    """Family and folder of the first test that has it."""
    words: tuple[str, ...]
    hidden_size: int
    ranks: int | None


def argument_sets(checkout: Path) -> list[Functional]:
    """Return the different argument sets of the families' tests that train, of a checkout of Megatron-LM."""
    found: dict[tuple[str, ...], Functional] = {}
    for family in FAMILIES:
        for path in sorted((checkout / "tests/functional_tests/test_cases" / family).glob("*/model_config.yaml")):
            arguments = yaml.safe_load(path.read_text(encoding="utf-8")).get("MODEL_ARGS") or {}
            if not {"--train-iters", "--train-samples"} & set(arguments) or not arguments.get("--hidden-size"):
                continue  # inference, conversion, models from a checkpoint
            if arguments.get("--perform-rl-step"):
                continue  # another script's: train_rl.py
            words = tuple(_words(arguments))
            nodes = re.search(r"_(\d+)N(\d+)G", path.parent.name)
            ranks = int(nodes[1]) * int(nodes[2]) if nodes else None
            hidden = int(arguments["--hidden-size"])
            found.setdefault(words, Functional(f"{family}/{path.parent.name}", words, hidden, ranks))
    return list(found.values())


def _words(arguments: dict[str, Any]) -> Iterator[str]:
    for flag, value in arguments.items():
        if flag in LEFT_OUT or value is False or value is None or "${" in str(value):
            continue
        yield flag
        if value is not True:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            several = re.fullmatch(r"\[([a-z0-9][\w. ]*)\]", text)
            yield from shlex.split(several[1] if several else text)


# Of an example, what it wants to be called with; DIR is an empty folder, MACHINE a file that says 4 GPUs.
EXAMPLES = {
    "llama/train_llama3_8b_h100_fp8.sh": "DIR DIR MOCK MOCK",
    "mixtral/train_mixtral_8x7b_distributed.sh": "DIR tokenizer.model data",
    "mamba/train.sh": "data tokenizer.model",
    "gptoss/02_train.sh": "--checkpoint-path DIR --tensorboard-logs-path DIR --distributed-config-file MACHINE",
    "megatron_fsdp/train_llama3_8b_fsdp_h100_fp8.sh": "DIR DIR MOCK MOCK",
    "megatron_fsdp/sbatch_mfsdp_deepseek_v3.sh": "",
}
# In the place of launchers: the first writes down its arguments, one a line, the second the script it is given.
_STUBS = {
    **dict.fromkeys(("torchrun", "python", "uv"), '#!/bin/bash\nprintf "%s\\n" "$@" >> "$RECORDED"\n'),
    "sbatch": '#!/bin/bash\ncat >> "$RECORDED"\n',
}


def example(checkout: Path, script: str, folder: Path) -> list[str]:
    """Return the arguments with which an example of Megatron-LM's starts its training script; it runs in `folder`."""
    empty, stubs, recorded = folder / "empty", folder / "stubs", folder / "recorded"
    empty.mkdir()
    stubs.mkdir()
    for name, text in _STUBS.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    shutil.copy(checkout / "pretrain_gpt.py", folder)
    machine = folder / "machine"
    machine.write_text("GPUS_PER_NODE=4\nNUM_NODES=1\nMASTER_ADDR=localhost\nMASTER_PORT=6000\nNODE_RANK=0\n")
    words = EXAMPLES[script].replace("DIR", str(empty)).replace("MACHINE", str(machine)).split()
    subprocess.run(
        ["bash", str(checkout / "examples" / script), *words],
        cwd=folder,
        env=os.environ
        | {"PATH": f"{stubs}:{os.environ['PATH']}", "RECORDED": str(recorded), "MEGATRON_PATH": str(folder)}
        | {"OUTPUT_PATH": str(empty), "OUTPUT_DIR": str(empty)},
        check=False,
        capture_output=True,
    )
    after = re.search(r"pretrain_\w+\.py(.*?)(?:\" 2>&1.*)?\Z", recorded.read_text(), re.DOTALL)
    assert after, recorded.read_text()
    return after[1].replace("\\\n", " ").split()
