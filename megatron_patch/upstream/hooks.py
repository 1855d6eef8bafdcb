"""Replacing Megatron functions: checked before anything is touched, undone in reverse, in this one place."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megatron_patch.errors import UpstreamChanged

SUPPORTED_MEGATRON = ("0.19",)
"""Release series of Megatron that `run` and `explain` are tested with."""

SUPPORTED_CORE = ("0.17", "0.18", "0.19")
"""Release series of megatron.core whose param groups, scheduler and audit are tested, without its trainer."""


@dataclass(frozen=True)
class Hook:
    """One assignment to a name of Megatron's."""

    target: str
    """``module:attribute``."""
    parameters: tuple[str, ...]
    """Parameters of the original that the replacement relies on."""
    wrap: Callable[[Any], Any]
    """Original -> replacement."""
    why: str
    also_bound_in: tuple[str, ...] = ()
    """Modules that hold the same object under the same name and need not see the replacement."""


@dataclass
class _Assigned:
    hook: Hook
    module: ModuleType
    attribute: str
    original: Any
    replacement: Any


class Installation:
    """The hooks of one `install`; `remove` restores every original. Also a context manager."""

    def __init__(self, assigned: list[_Assigned], copies: list[_Assigned]) -> None:
        self._assigned = assigned
        self._copies = copies

    def check(self) -> None:
        """Make sure that `remove` can restore the originals.

        Raises:
            UpstreamChanged: somebody replaced one of our replacements in the meantime.
        """
        for a in self._assigned:
            if getattr(a.module, a.attribute) is not a.replacement:
                raise UpstreamChanged(f"{a.hook.target} was replaced again after megatron_patch; undo that first")

    def remove(self) -> None:
        """Restore the originals in reverse order.

        Raises:
            UpstreamChanged: somebody replaced one of our replacements in the meantime; nothing is restored then.
        """
        self.check()
        for a in reversed(self._assigned):
            setattr(a.module, a.attribute, a.original)
        for a in self._copies:
            if vars(a.module).get(a.attribute) is a.replacement:  # else their owner has made something else of the name
                setattr(a.module, a.attribute, a.original)
        self._assigned, self._copies = [], []

    def __enter__(self) -> "Installation":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def check_version(allow_untested: bool = False) -> str:
    """Return Megatron's version.

    Raises:
        UpstreamChanged: a series this package was not tested with, unless `allow_untested`; or no Megatron at all.
    """
    try:
        core = importlib.import_module("megatron.core")
    except ModuleNotFoundError as error:
        if error.name not in ("megatron", "megatron.core"):
            raise
        raise UpstreamChanged(
            "megatron-core is not installed in this Python: pip install 'megatron-core>=0.19,<0.20'"
        ) from None
    version = str(getattr(core, "__version__", "without a version"))
    if not allow_untested and not any(version == s or version.startswith(s + ".") for s in SUPPORTED_MEGATRON):
        raise UpstreamChanged(
            f"megatron-core {version}: megatron_patch is tested with {', '.join(SUPPORTED_MEGATRON)} only; install one "
            "of these, or add --allow-untested-megatron to try"
        )
    return version


def refuse_other_megatron() -> None:
    """To be called when a script asks for Megatron's parser.

    Raises:
        UpstreamChanged: the script has put another Megatron in front of the hooked one, and would get parts of both.
    """
    in_use = sys.modules["megatron.core"]
    # Of a namespace package, which `megatron` is, this follows sys.path.
    folders = sys.modules["megatron"].__path__
    specs = (finder.find_spec("megatron.core", folders) for finder in sys.meta_path)
    first = next((spec.origin for spec in specs if spec and spec.origin), None)
    if first and in_use.__file__ and not os.path.samefile(first, in_use.__file__):
        raise UpstreamChanged(
            f"the script has put the Megatron in {_folder(first)} first on sys.path, after that in "
            f"{_folder(in_use.__file__)} was imported; start with PYTHONPATH={_folder(first)} instead"
        )


def _folder(path: str) -> str:
    """/a/megatron/core/__init__.py -> /a"""
    return os.path.dirname(os.path.dirname(os.path.dirname(path)))


def install(hooks: Sequence[Hook]) -> Installation:
    """Check all hooks, then assign all.

    Where the user's script, or a module of theirs, has imported a target by name, that name is assigned as well.

    Raises:
        UpstreamChanged: a target is missing, is hooked already, lacks a parameter we rely on, or is bound in another
            module of Megatron's where the assignment would not reach. Nothing is assigned then.
    """
    checked = [_check(hook) for hook in hooks]
    targets = [hook.target for hook in hooks]
    if twice := [target for target in targets if targets.count(target) > 1]:
        raise UpstreamChanged(f"{twice[0]} is hooked twice by megatron_patch itself")
    bindings = _bindings([original for *_, original in checked])
    for hook, (_, _, original), bound in zip(hooks, checked, bindings, strict=True):
        _check_reach(hook, original, bound)
    assigned, copies = [], []
    for hook, (module, attribute, original), bound in zip(hooks, checked, bindings, strict=True):
        replacement = hook.wrap(original)
        replacement._megatron_patch = hook.target
        assigned.append(_Assigned(hook, module, attribute, original, replacement))
        copies += [
            _Assigned(hook, user, name, original, replacement)
            for path, user, name in bound
            if path.partition(".")[0] not in ("megatron", __name__.partition(".")[0])
        ]
    for a in [*assigned, *copies]:
        setattr(a.module, a.attribute, a.replacement)
    return Installation(assigned, copies)


def _bindings(originals: Sequence[Any]) -> list[list[tuple[str, ModuleType, str]]]:
    """Return of every original where it is bound: path of the module, module, name; one pass over all modules."""
    found: dict[int, list[tuple[str, ModuleType, str]]] = {id(original): [] for original in originals}
    for path, module in list(sys.modules.items()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in found:
                found[id(value)].append((path, module, name))
    return [found[id(original)] for original in originals]


def _check_reach(hook: Hook, original: Any, bound: Sequence[tuple[str, ModuleType, str]]) -> None:
    allowed = {hook.target.partition(":")[0], getattr(original, "__module__", None), *hook.also_bound_in}
    elsewhere = dict.fromkeys(path for path, *_ in bound if path.startswith("megatron.") and path not in allowed)
    if elsewhere:
        raise UpstreamChanged(f"{hook.target} is also bound in {', '.join(elsewhere)}, where our hook would not reach")


def _check(hook: Hook) -> tuple[ModuleType, str, Any]:
    module_name, _, attribute = hook.target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not module_name.startswith(error.name or "?"):
            raise
        module = None
    if not hasattr(module, attribute):
        raise UpstreamChanged(f"{hook.target} does not exist in this Megatron (needed to {hook.why})")
    assert module is not None
    original = getattr(module, attribute)
    if hasattr(original, "_megatron_patch"):
        raise UpstreamChanged(f"{hook.target} is hooked already: install megatron_patch once per process")
    missing = [p for p in hook.parameters if p not in inspect.signature(original).parameters]
    if missing:
        raise UpstreamChanged(f"{hook.target} has no parameter {', '.join(missing)} any more (needed to {hook.why})")
    return module, attribute, original


type Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def around(handler: Callable[..., Any], *names: str) -> Wrap:
    """Return the `wrap` of a `Hook` whose replacement is ``handler(call, *values)``.

    Args:
        handler: gets `call`, which calls the original as its caller did, but for the arguments it is given by name.
        names: parameters of the original; their values, defaults applied, follow `call`.
    """

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            def call(**changed: Any) -> Any:
                if not changed:
                    return original(*args, **kwargs)
                bound = signature.bind(*args, **kwargs)
                bound.arguments.update(changed)
                return original(*bound.args, **bound.kwargs)

            return handler(call, *_values(signature, names, args, kwargs))

        return replacement

    return wrap


def before(handler: Callable[..., None], *names: str) -> Wrap:
    """Return the `wrap` of a `Hook` that calls ``handler(*values)`` and then the original."""

    def both(call: Callable[..., Any], *given: Any) -> Any:
        handler(*given)
        return call()

    return around(both, *names)


def after(handler: Callable[..., None], *names: str) -> Wrap:
    """Return the `wrap` of a `Hook` that calls the original and then ``handler(result, *values)``."""

    def both(call: Callable[..., Any], *given: Any) -> Any:
        result = call()
        handler(result, *given)
        return result

    return around(both, *names)


def _values(
    signature: inspect.Signature, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Return the values that a call gives the parameters `names`, defaults applied."""
    if not names:
        return ()
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments[name] for name in names)
