"""The dependency rule of the package, read off its source: who may import whom, who may assign to foreign names.

    errors, config, files  <-  theory  <-  metrics  <-  upstream  <-  experiments  <-  explain, run, in_code  <-  tools

Each layer imports from those to its left only. `theory` is the standard library alone; `metrics` adds torch; `upstream`
alone imports Megatron, DeepSpeed or Transformer Engine, assigns to names that are not ours, and installs hooks.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("megatron_patch", "tools", "launch")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)
FORBIDDEN = ("megatron", "deepspeed", "transformer_engine")
LAYERS = ("base", "theory", "metrics", "upstream", "experiments", "entry", "script")
# What each layer may import from outside the standard library and this package; None: anything but FORBIDDEN.
THIRD_PARTY: dict[str, tuple[str, ...] | None] = {
    "base": (),
    "theory": (),
    "metrics": ("torch",),
    "upstream": (
        "torch",
        "numpy",
        "packaging",
        *FORBIDDEN,
    ),  # packaging: the versions Megatron compares are its objects
    "experiments": None,
    "entry": None,
    "script": None,
}
# The one module of its layer with a need of its own.
ALSO_ALLOWED = {"megatron_patch/yaml_flags.py": ("yaml",)}
# The one place that runs before the flags are known, and the one that runs when they are: which hooks a run needs is
# known only inside Megatron's own validation, long after run.py has handed over to the script.
INSTALLERS = (
    "megatron_patch/run.py",
    "megatron_patch/explain.py",
    "megatron_patch/in_code.py",
    "megatron_patch/upstream/patch.py",
)
# Importing it imports nothing; its functions import what they offer when they are called.
FRONT_DOOR = "megatron_patch/__init__.py"
# An ordinary Megatron script: it is Megatron's user as anybody's own script is, and not part of the package.
MEGATRON_SCRIPT = "launch/pretrain_gpt.py"
# Running a script as if it had been started directly is what run.py is for.
OWN_INTERPRETER = {"megatron_patch/run.py": {"sys"}}
LONGEST = 400


def layer_of(module: str) -> str:
    """The layer of a module of this package, by its dotted name."""
    part = module.split(".")[1] if "." in module else ""
    if part in LAYERS:
        return part
    return "entry" if part in ("run", "__main__", "explain", "in_code") else "base"


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
    layer = "entry" if path == FRONT_DOOR else layer_of(dotted) if inside else "script"
    found = []
    for line, module in imports(tree):
        top = module.partition(".")[0]
        if top == "megatron_patch":
            theirs = layer_of(module)
            if LAYERS.index(theirs) > LAYERS.index(layer) or (layer, theirs) == ("theory", "base"):
                found.append(f"{path}:{line}: {layer} imports {module}, which is above it")
        elif top not in sys.stdlib_module_names and path != MEGATRON_SCRIPT:
            allowed = THIRD_PARTY[layer]
            if top in FORBIDDEN if allowed is None else top not in (*allowed, *ALSO_ALLOWED.get(path, ())):
                found.append(f"{path}:{line}: {layer} imports {module}")
    if layer != "upstream" and path != MEGATRON_SCRIPT:
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


def test_all_layers_are_there() -> None:
    """An empty list of files would keep every rule."""
    layers = {layer_of(".".join(p.relative_to(ROOT).with_suffix("").parts)) for p in SOURCES if "tools" not in p.parts}
    assert {"base", "theory", "metrics", "upstream", "experiments", "entry"} <= layers
    assert {"tools", "launch"} <= {p.relative_to(ROOT).parts[0] for p in SOURCES}


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("megatron_patch/theory/x.py", "import torch", "theory imports torch"),
        ("megatron_patch/theory/x.py", "def f():\n    import numpy as np", "theory imports numpy"),
        ("megatron_patch/theory/x.py", "from megatron_patch.errors import ConfigError", "above it"),
        ("megatron_patch/theory/x.py", "from megatron_patch.metrics import reduce", "above it"),
        ("megatron_patch/metrics/x.py", "import megatron.core", "metrics imports megatron.core"),
        ("megatron_patch/metrics/x.py", "from megatron_patch import upstream", "above it"),
        ("megatron_patch/metrics/x.py", "import torch\ntorch.add = None", "attribute of torch"),
        (
            "megatron_patch/metrics/x.py",
            "from torch import Tensor as T\nsetattr(T, 'x', 1)",
            "attribute of torch.Tensor",
        ),
        ("megatron_patch/config.py", "import yaml", "base imports yaml"),
        ("megatron_patch/config.py", "from megatron_patch.theory.width import RULES", "above it"),
        ("megatron_patch/experiments/x.py", "from megatron.training import get_args", "experiments imports megatron"),
        ("megatron_patch/experiments/x.py", "from megatron_patch.run import run", "above it"),
        (
            "megatron_patch/run.py",
            "import importlib\nimportlib.import_module('deepspeed.ops')",
            "entry imports deepspeed",
        ),
        ("megatron_patch/run.py", "import json, torch\nx, torch.y = 1, 2", "attribute of torch"),
        ("megatron_patch/upstream/x.py", "from megatron_patch.experiments import corpus", "above it"),
        (
            "megatron_patch/upstream/x.py",
            "from megatron_patch.upstream.hooks import install\ninstall(())",
            "calls install()",
        ),
        ("tools/x.py", "import transformer_engine.pytorch as te", "script imports transformer_engine"),
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
            "megatron_patch/experiments/x.py",
            "import datasets\nfrom megatron_patch.upstream import indexed_dataset_builder",
        ),
        ("megatron_patch/run.py", "import sys\nsys.argv = []\nself.x = 1"),
        ("launch/pretrain_gpt.py", "from megatron.core import utils\nutils.x = 1"),
    ],
)
def test_what_is_allowed_is_not_found(path: str, source: str) -> None:
    assert breaches(path, source) == []
