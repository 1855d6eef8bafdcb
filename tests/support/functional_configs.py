"""The argument sets of Megatron-LM's functional tests, as command lines that `explain` can be given anywhere."""

import re
import shlex
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
            yield from shlex.split(text[1:-1] if text.startswith("[") and " " in text else text)
