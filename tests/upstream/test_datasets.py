"""The wheel's compiled dataset helpers are used as they are; where there are none, Megatron compiles them as ever."""

import importlib.util

from megatron_patch.upstream import datasets
from tests.support.pool import Pool


def _calls_of_the_original() -> tuple[int, int]:
    """How often Megatron's own function is called with the compiled module there, and without it."""
    calls: list[None] = []
    compile_helpers = datasets.skip_compile_helpers(lambda: calls.append(None))
    assert datasets.helpers_importable()
    compile_helpers()
    with_module = len(calls)
    importlib.util.find_spec = lambda *args: None  # the job is a process of its own
    compile_helpers()
    return with_module, len(calls) - with_module


def test_only_what_is_missing_is_compiled(pool: Pool) -> None:
    assert pool.run(_calls_of_the_original, distributed=False) == [(0, 1)]
