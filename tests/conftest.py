"""Fixtures for all tests: the pool of workers, a small corpus and its tokenizer, the tools as functions."""

import json
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_patch.data.corpus import open_corpus, stdlib_files
from megatron_patch.data.tokenizer import train_tokenizer
from tests.support.pool import ROOT, Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The session's pool of worker processes; see tests/support/pool.py."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """About 40 documents of code and 5 awkward ones; none is empty."""
    files = [file for file in stdlib_files() if "/asyncio/" in file or "/json/" in file]
    code = [Path(file).read_text(encoding="utf-8") for file in files]
    awkward = ["tabs\tand\r\nreturns\r", " \n\n  ", "é😀 中文 \u2028 \x00", "</s><s><unk><0x0A>", "x"]
    return code + awkward


@pytest.fixture(scope="session")
def jsonl(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The documents, with another column, as a .jsonl file."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"url": str(i), "text": text}) + "\n" for i, text in enumerate(documents)))
    return str(path)


@pytest.fixture(scope="session")
def model(jsonl: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sentencepiece model trained on the documents."""
    prefix = tmp_path_factory.mktemp("model") / "code"
    train_tokenizer(open_corpus(jsonl), str(prefix), vocab_size=600)
    return f"{prefix}.model"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Run ``tool("preprocess_data", "--input", ...)`` in this process; returns the exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(name: str, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code: int = runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"]()
        return code

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
