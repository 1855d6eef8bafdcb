"""Megatron's datasets: writing them, and their compiled helpers, which the wheel brings along."""

import functools
import importlib.util
import warnings
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


def indexed_dataset_builder(bin_path: str, vocab_size: int) -> Any:
    """Return Megatron's `IndexedDatasetBuilder`, writing to `bin_path` in the dtype Megatron gives `vocab_size` ids.

    Megatron is imported here and not above: the import costs seconds and only a run that has tokens to write needs it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron misses GPU libraries that have no part in writing a file
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    return IndexedDatasetBuilder(bin_path, dtype=DType.optimal_dtype(vocab_size))
