"""Replacing Megatron functions: checked before anything is touched, undone in reverse, in this one place."""

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megatron_patch.errors import UpstreamChanged

SUPPORTED_MEGATRON = ("0.19",)
"""Release series this package is tested with."""


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

    def __init__(self, assigned: list[_Assigned]) -> None:
        self._assigned = assigned

    def remove(self) -> None:
        """Restore the originals in reverse order.

        Raises:
            UpstreamChanged: somebody replaced one of our replacements in the meantime; nothing is restored then.
        """
        for a in self._assigned:
            if getattr(a.module, a.attribute) is not a.replacement:
                raise UpstreamChanged(f"{a.hook.target} was replaced again after megatron_patch; undo that first")
        for a in reversed(self._assigned):
            setattr(a.module, a.attribute, a.original)
        self._assigned = []

    def __enter__(self) -> "Installation":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def check_version(allow_untested: bool = False) -> str:
    """Return Megatron's version.

    Raises:
        UpstreamChanged: a series this package was not tested with, unless `allow_untested`.
    """
    version = str(importlib.import_module("megatron.core").__version__)
    if not allow_untested and not any(version == s or version.startswith(s + ".") for s in SUPPORTED_MEGATRON):
        raise UpstreamChanged(
            f"megatron-core {version}: megatron_patch is tested with {', '.join(SUPPORTED_MEGATRON)} only; install one "
            "of these, or add --allow-untested-megatron to try"
        )
    return version


def install(hooks: Sequence[Hook]) -> Installation:
    """Check all hooks, then assign all.

    Raises:
        UpstreamChanged: a target is missing, is hooked already, lacks a parameter we rely on, or is bound in another
            loaded Megatron module where the assignment would not reach. Nothing is assigned then.
    """
    checked = [_check(hook) for hook in hooks]
    for a in checked:
        a.replacement._megatron_patch = a.hook.target
        setattr(a.module, a.attribute, a.replacement)
    return Installation(checked)


def _check(hook: Hook) -> _Assigned:
    module_name, _, attribute = hook.target.partition(":")
    module = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        raise UpstreamChanged(f"{hook.target} does not exist in this Megatron (needed to {hook.why})")
    original = getattr(module, attribute)
    if hasattr(original, "_megatron_patch"):
        raise UpstreamChanged(f"{hook.target} is hooked already: install megatron_patch once per process")
    missing = [p for p in hook.parameters if p not in inspect.signature(original).parameters]
    if missing:
        raise UpstreamChanged(f"{hook.target} has no parameter {', '.join(missing)} any more (needed to {hook.why})")
    allowed = {module_name, getattr(original, "__module__", None), *hook.also_bound_in}
    elsewhere = [
        name
        for name, other in list(sys.modules.items())
        if name.startswith("megatron.") and name not in allowed and vars(other).get(attribute) is original
    ]
    if elsewhere:
        raise UpstreamChanged(f"{hook.target} is also bound in {', '.join(elsewhere)}, where our hook would not reach")
    return _Assigned(hook, module, attribute, original, hook.wrap(original))


def argument(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the value that a call ``function(*args, **kwargs)`` gives the parameter `name`, defaults applied."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments[name]
