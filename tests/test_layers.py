"""The walls of the house, read off its source: who may import whom, who may assign to foreign names, how big a room is.

`FLOORS` in tests/support/floors.py is the rule, to be read as documentation; docs/architecture.md draws it.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.floors import FLOORS, Floor

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("megatron_patch", "tools", "launch")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)

SCRIPTS = "entry"
"""What the scripts in tools/ may import; one in launch/ is an ordinary Megatron script, as anybody's own is."""
MEGATRON_SCRIPTS = ("launch/pretrain.py", "launch/pretrain_gpt.py")
# Which hooks a run needs is known only inside Megatron's own validation, so the session that began goes on installing
# there, long after run.py has handed over to the script.
INSTALLERS = ("megatron_patch/upstream/patch.py",)
# Running a script as if it had been started directly is what run.py is for.
OWN_INTERPRETER = {"megatron_patch/entry/run.py": {"sys"}}
LONGEST = 400
LARGEST_ROOM = 0.27
"""Of the lines of the package, in one folder."""


def floor_of(module: str) -> str:
    """The floor of a module of this package, by its dotted name; the front door and __main__ belong to the entry."""
    part = [*module.split("."), ""][1]
    return part if part in FLOORS else "entry"


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every imported module with its line, those given to `import_module` or `find_spec` as text included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            assert node.module is not None
            # `from megatron_patch.upstream import flags` imports megatron_patch.upstream.flags, if that is a module.
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            text = node.args[0]
            if name in ("import_module", "__import__") and isinstance(text, ast.Constant):
                yield node.lineno, str(text.value)


def assigned_attributes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The name at the root of every ``root.a.b = ...``, ``del root.a`` and ``setattr(root.a, ...)``, with its line."""
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = list(node.targets)
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Delete):
            targets = list(node.targets)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
            targets = [ast.Attribute(node.args[0], "", ast.Store())]
        while targets:
            target = targets.pop()
            if isinstance(target, (ast.Tuple, ast.List)):
                targets += target.elts
                continue
            root: ast.expr = target
            while isinstance(root, (ast.Attribute, ast.Subscript)):
                root = root.value
            # The environment is there to be assigned to.
            if root is not target and isinstance(root, ast.Name) and not ast.unparse(target).startswith("os.environ["):
                yield node.lineno, root.id


def foreign_names(tree: ast.AST) -> dict[str, str]:
    """The names that imports of other packages bind anywhere in the file: ``{"np": "numpy"}``."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound.update((a.asname or a.name.partition(".")[0], a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            bound.update((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)
    return {name: module for name, module in bound.items() if module.partition(".")[0] != "megatron_patch"}


def breaches(path: str, source: str) -> list[str]:
    """Every breach of the rule in a file, as text; `path` is relative to the project."""
    tree = ast.parse(source)
    inside = path.startswith("megatron_patch/")
    dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    room = floor_of(dotted) if inside else "script"
    floor = FLOORS[room] if inside else Floor("", SCRIPTS)
    found = []
    for line, module in imports(tree):
        top = module.partition(".")[0]
        if top == "megatron_patch":
            theirs = floor_of(module)
            if theirs not in (room, *floor.imports.split()):
                found.append(f"{path}:{line}: {room} may not import {module}")
        elif top not in sys.stdlib_module_names and path not in MEGATRON_SCRIPTS and top not in floor.packages.split():
            found.append(f"{path}:{line}: {room} may not import {module}")
    if room != "upstream" and path not in MEGATRON_SCRIPTS:
        foreign = foreign_names(tree)
        for line, name in assigned_attributes(tree):
            if name in foreign and name not in OWN_INTERPRETER.get(path, ()):
                found.append(f"{path}:{line}: assigns to an attribute of {foreign[name]}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called == "install" and path not in INSTALLERS:
                found.append(f"{path}:{node.lineno}: calls install(), as only {' and '.join(INSTALLERS)} may")
    if len(source.splitlines()) >= LONGEST:
        found.append(f"{path}: {len(source.splitlines())} lines; {LONGEST - 1} are the limit, split it")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_keeps_the_rule(path: Path) -> None:
    assert breaches(str(path.relative_to(ROOT)), path.read_text()) == []


def _modules() -> dict[str, Path]:
    """The package's modules by their dotted names; a folder's name is its __init__."""
    inside = (path for path in SOURCES if path.is_relative_to(ROOT / "megatron_patch"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in inside}


def test_every_floor_is_there() -> None:
    """An empty list of files would keep every rule."""
    assert {floor_of(module) for module in _modules()} == set(FLOORS)
    assert {"tools", "launch"} <= {path.relative_to(ROOT).parts[0] for path in SOURCES}


def test_every_permission_is_used() -> None:
    """The table says what is, not what might be."""
    used: dict[str, set[str]] = {room: set() for room in FLOORS}
    for dotted, path in _modules().items():
        for _, module in imports(ast.parse(path.read_text())):
            top = module.partition(".")[0]
            used[floor_of(dotted)].add(floor_of(module) if top == "megatron_patch" else top)
    unused = {
        room: sorted(set(f"{floor.imports} {floor.packages}".split()) - used[room]) for room, floor in FLOORS.items()
    }
    assert {room: names for room, names in unused.items() if names} == {}


def test_no_import_goes_in_a_circle() -> None:
    modules = _modules()
    graph: dict[str, set[str]] = {}
    for dotted, path in modules.items():
        named = {module for _, module in imports(ast.parse(path.read_text()))}
        # `from a.b import c` imports a.b.c, if that is a module, else a.b.
        graph[dotted] = {m if m in modules else m.rpartition(".")[0] for m in named} & set(modules) - {dotted}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_room_is_too_big() -> None:
    lines = Counter[str]()
    for dotted, path in _modules().items():
        lines[floor_of(dotted)] += len(path.read_text().splitlines())
    room, size = lines.most_common(1)[0]
    assert size <= LARGEST_ROOM * lines.total(), f"{room} is {size / lines.total():.0%} of the package"


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("megatron_patch/theory/x.py", "import torch", "theory may not import torch"),
        ("megatron_patch/theory/x.py", "def f():\n    import numpy as np", "theory may not import numpy"),
        ("megatron_patch/theory/x.py", "from megatron_patch.errors import ConfigError", "may not import"),
        ("megatron_patch/theory/x.py", "from megatron_patch.metrics import reduce", "may not import"),
        ("megatron_patch/metrics/x.py", "import megatron.core", "metrics may not import megatron.core"),
        ("megatron_patch/metrics/x.py", "from megatron_patch import upstream", "may not import"),
        ("megatron_patch/metrics/x.py", "import torch\ntorch.add = None", "attribute of torch"),
        ("megatron_patch/metrics/x.py", "from torch import Tensor as T\nsetattr(T, 'x', 1)", "of torch.Tensor"),
        ("megatron_patch/config/x.py", "import yaml", "config may not import yaml"),
        ("megatron_patch/files/x.py", "from megatron_patch.runs.trial import Trial", "files may not import"),
        ("megatron_patch/report/x.py", "from megatron.training import get_args", "report may not import megatron"),
        ("megatron_patch/report/x.py", "from megatron_patch.entry.run import run", "may not import"),
        ("megatron_patch/fit/x.py", "from megatron_patch.sweep.engine import Engine", "fit may not import"),
        (
            "megatron_patch/entry/run.py",
            "import importlib\nimportlib.import_module('deepspeed.ops')",
            "entry may not import deepspeed",
        ),
        ("megatron_patch/entry/run.py", "import json, rich\nx, rich.y = 1, 2", "attribute of rich"),
        ("megatron_patch/upstream/x.py", "from megatron_patch.data import corpus", "may not import"),
        (
            "megatron_patch/upstream/x.py",
            "from megatron_patch.upstream.hooks import install\ninstall(())",
            "calls install()",
        ),
        ("tools/x.py", "import transformer_engine.pytorch as te", "script may not import transformer_engine"),
        ("tools/x.py", "from megatron_patch.upstream import flags", "script may not import"),
        ("tools/x.py", "\n" * 400, "lines"),
    ],
)
def test_every_breach_is_found(path: str, source: str, complaint: str) -> None:
    (found,) = breaches(path, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_patch/theory/x.py", "import math\nfrom megatron_patch.theory.width import RULES"),
        (
            "megatron_patch/metrics/x.py",
            "import torch.distributed as dist\nfrom megatron_patch.errors import ConfigError",
        ),
        ("megatron_patch/upstream/x.py", "from megatron.training import training\ntraining.train = None"),
        (
            "megatron_patch/data/x.py",
            "import datasets\nfrom megatron_patch.upstream.datasets import indexed_dataset_builder",
        ),
        ("megatron_patch/entry/run.py", "import sys\nsys.argv = []\nself.x = 1"),
        ("launch/pretrain.py", "from megatron.core import utils\nutils.x = 1"),
    ],
)
def test_what_is_allowed_is_not_found(path: str, source: str) -> None:
    assert breaches(path, source) == []


def test_no_test_module_imports_another() -> None:
    """What several tests need is in tests/support, so that a test file can be moved, split or dropped alone."""
    modules = sorted((ROOT / "tests").rglob("*.py"))
    assert len(modules) > 50
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                parts = name.split(".")
                # tests.unit_tests are Megatron's own
                if parts[0] != "tests" or parts[1] == "unit_tests":
                    continue
                assert not any(part.startswith("test_") for part in parts), f"{path}: {name}"
