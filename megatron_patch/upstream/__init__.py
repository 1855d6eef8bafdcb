"""The only package that imports megatron or deepspeed, or assigns to a name of theirs."""

import warnings
from typing import Any


def indexed_dataset_builder(bin_path: str, vocab_size: int) -> Any:
    """Return Megatron's `IndexedDatasetBuilder`, writing to `bin_path` in the dtype Megatron gives `vocab_size` ids.

    Megatron is imported here and not above: the import costs seconds and only a run that has tokens to write needs it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron misses GPU libraries that have no part in writing a file
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    return IndexedDatasetBuilder(bin_path, dtype=DType.optimal_dtype(vocab_size))
