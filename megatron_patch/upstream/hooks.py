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


def install(hooks: Sequence[Hook]) -> Installation:
    """Check all hooks, then assign all.

    Raises:
        UpstreamChanged: a target is missing, is hooked already, lacks a parameter we rely on, or is bound in another
            module where the assignment would not reach. Nothing is assigned then.
    """
    checked = [_check(hook) for hook in hooks]
    targets = [hook.target for hook in hooks]
    if twice := [target for target in targets if targets.count(target) > 1]:
        raise UpstreamChanged(f"{twice[0]} is hooked twice by megatron_patch itself")
    assigned = []
    for hook, (module, attribute, original) in zip(hooks, checked, strict=True):
        replacement = hook.wrap(original)
        replacement._megatron_patch = hook.target
        assigned.append(_Assigned(hook, module, attribute, original, replacement))
    for a in assigned:
        setattr(a.module, a.attribute, a.replacement)
    return Installation(assigned)


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
    allowed = {module_name, getattr(original, "__module__", None), *hook.also_bound_in}
    elsewhere = [
        name
        for name, other in list(sys.modules.items())
        if (name.startswith("megatron.") or name == "__main__")
        and name not in allowed
        and any(value is original for value in list(getattr(other, "__dict__", {}).values()))
    ]
    if elsewhere:
        raise UpstreamChanged(f"{hook.target} is also bound in {', '.join(elsewhere)}, where our hook would not reach")
    return module, attribute, original


def argument(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the value that a call ``function(*args, **kwargs)`` gives the parameter `name`, defaults applied."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments[name]
