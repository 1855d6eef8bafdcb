"""What Megatron's trainer needs to run from the wheel instead of a checkout."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any


def helpers_importable() -> bool:
    """Return whether the compiled dataset helpers are there; the wheel has them."""
    return importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None


def skip_compile_helpers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `compile_helpers` that compiles only what is missing.

    Megatron's runs ``make`` in its own folder and exits the process when that fails, as it does in the wheel, which has
    the compiled module and no Makefile.
    """

    @functools.wraps(original)
    def compile_helpers() -> None:
        if not helpers_importable():
            original()

    return compile_helpers
