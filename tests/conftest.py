"""Fixtures for all tests: the pool of workers, a small corpus and its tokenizer, the tools as functions."""

import inspect
import json
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from megatron_patch.data.corpus import open_corpus, stdlib_files
from megatron_patch.data.tokenizer import train_tokenizer
from tests.support.pool import ROOT, Pool

# A busy machine makes tests slow, never red; and tmp_path is written anew by every example.
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("tests")

# What `make test-fast` leaves out: tests that start processes, by a word in their source or in that of their fixtures,
# and whole folders and files that train, load Megatron, draw or try everything.
SLOW_WORDS = ("subprocess", "Popen", "pool.run", "pool: Pool", "chromium")
SLOW_PLACES = frozenset(
    "bridge core data faults hosts launch report sweep te upstream upstream_suite".split()
    + "test_fuzz.py test_fuzz_tools.py test_spectral.py".split()
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark `slow` what `make test-fast` leaves out."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        sources = [inspect.getsource(f) for f in (item.function, *(d.func for ds in fixtures for d in ds))]
        places = item.path.relative_to(ROOT).parts
        if SLOW_PLACES.intersection(places) or any(word in source for source in sources for word in SLOW_WORDS):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The session's pool of worker processes; see tests/support/pool.py."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def deepspeed_pool() -> Iterator[Pool]:
    """Another, whose ranks find DeepSpeed imported: half a second of each. The other's do not have it."""
    pool = Pool("deepspeed")
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
