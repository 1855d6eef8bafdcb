"""`from megatron_patch.theory import ...` gives what the modules document."""

import importlib
import inspect
from types import ModuleType

import pytest

from megatron_patch import theory

MODULES = ("alignment", "deviation", "equilibrium", "schedules", "transfer", "updates", "width")
# The function that its module would be hidden by, and two that make text for messages.
ELSEWHERE = {"alignment", "times", "fraction"}


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_is_there(name: str) -> None:
    module = importlib.import_module(f"megatron_patch.theory.{name}")
    own = {
        key
        for key, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == module.__name__
    }
    public = {key for key in own if not key.startswith("_")}
    assert public - ELSEWHERE <= set(theory.__all__)


def test_every_name_is_there_once() -> None:
    assert len(set(theory.__all__)) == len(theory.__all__)
    assert all(hasattr(theory, name) for name in theory.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_no_name_hides_a_module(name: str) -> None:
    assert isinstance(getattr(theory, name), ModuleType)
