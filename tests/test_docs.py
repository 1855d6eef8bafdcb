"""What the pages name is there: paths of the repository, the functions after them, make targets, links."""

import re
from pathlib import Path

import pytest

from megatron_patch.version import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_patch"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FOLDERS = ("tools", "tests", "docs", "launch", "configs", "benchmarks", "megatron_patch", ".ci")
CODE = re.compile(r"^```.*?^```|^(?: {4}.*\n)+|`[^`\n]+`", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?<![\w./{$-])((?:\.ci|[a-z_]+)(?:/[\w.*-]+)+)(?::(\w+))?")
LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)")
TARGET = re.compile(r"(?<![\w-])make ((?:[a-z][a-z-]*\b(?![=/.]) ?)+)")


def pieces(text: str) -> str:
    """All code of a page: blocks and what stands between backticks."""
    return "\n".join(CODE.findall(text))


def exists(path: str) -> bool:
    """Whether there is such a file or folder, from the root or inside the package; `*` stands for anything."""
    return any(any(folder.glob(path.rstrip("/."))) for folder in (ROOT, PACKAGE))


def named_paths(text: str) -> list[tuple[str, str]]:
    """Every path of the repository that a page names, with the function or class after its colon.

    The package's folders `data` and `runs` are also what users call theirs, so inside the package only modules count.
    """
    inside = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    found = []
    for path, name in PATH.findall(pieces(text)):
        top = path.partition("/")[0]
        if top in FOLDERS or (top in inside and path.endswith(".py")):
            found.append((path, name))
    return found


def missing(text: str) -> list[str]:
    """What a page names and nobody has."""
    gone = []
    for path, name in named_paths(text):
        if not exists(path):
            gone.append(path)
        elif name and path.endswith(".py"):
            source = next(p for p in (ROOT / path, PACKAGE / path) if p.exists()).read_text()
            if not re.search(rf"^\s*(?:def|class) {name}\b|^{name}\b.* = ", source, re.MULTILINE):
                gone.append(f"{path}:{name}")
    return gone


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_is_there(page: Path) -> None:
    assert set(missing(page.read_text())) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_is_there(page: Path) -> None:
    named = {word for words in TARGET.findall(pieces(page.read_text())) for word in words.split()}
    assert named - make_targets() == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if not link.startswith(("http", "mailto"))]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_run_is_called_a_run(page: Path) -> None:
    """The glossary of docs/architecture.md; the line that forbids the other word may name it."""
    text = page.read_text().replace('Not "a training"', "")
    assert re.findall(r"\b(?:a training(?! run| step| loss| set)\b|\w+ trainings\b)", text) == []


def test_the_citation_has_the_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_what_is_gone_is_found() -> None:
    assert missing("see `tests/nowhere/test_x.py` and `theory/width.py:RULES`") == ["tests/nowhere/test_x.py"]
    assert missing("see `theory/width.py:gone`") == ["theory/width.py:gone"]
    assert missing("```\npython tools/gone.py x\n```\n") == ["tools/gone.py"]
    assert missing("`runs/sweep-example/report.html`, `configs/*.yaml`") == []
    assert TARGET.findall(pieces("`make gone`, and make it so")) == ["gone"]


def test_pages_name_much() -> None:
    """An expression that matches nothing would find everything in order."""
    assert sum(len(named_paths(page.read_text())) for page in PAGES) > 150
    assert {"setup", "test", "lint"} <= make_targets()
