"""Pytest plugin for Megatron-LM's own unit tests: runs them on CPU, with or without megatron_patch, and notes outcomes.

Loaded by `tests/megatron_suite.py`, which sets the two environment variables that are read here. It is a module of its
own because inside a checkout of Megatron-LM the name `tests` is Megatron's.
"""

import functools
import importlib
import json
import os
import sys
import unittest.mock
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from megatron_patch.upstream.cpu.platform import activate


def _over_gloo(make: Any) -> Any:
    """A function of torch.distributed with a parameter `backend`: NCCL, which the tests ask for, needs GPUs."""

    @functools.wraps(make)
    def with_gloo(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        return make(*args, **kwargs)

    return with_gloo


def _no_download(**unused: Any) -> None:
    """Instead of the function with which conftest.py fetches data into /opt; no test that is run here reads them."""
    raise ImportError("not in these tests")


def _prepare() -> None:
    sys.modules.setdefault("mock", unittest.mock)  # the package of this name is the standard library's, for old Pythons
    download = ModuleType("tests.test_utils.python_scripts.download_unit_tests_dataset")
    download.download_and_extract_asset = _no_download  # type: ignore[attr-defined]
    sys.modules[download.__name__] = download
    activate()
    import torch

    for name in ("init_process_group", "new_group"):
        setattr(torch.distributed, name, _over_gloo(getattr(torch.distributed, name)))
    importlib.import_module("megatron.training.training")  # what the hooks replace, in either case

    # Imported at the head of test_optimizer.py, for a test that needs a GPU. After Megatron, which must not find it.
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.fp8"):
        sys.modules[name] = unittest.mock.MagicMock(__path__=[], __version__="0.0.0")


def _install_hooks() -> None:
    """Every hook there is, with a rule that changes nothing: both exponents are 0."""
    from megatron_patch.config import Settings, WidthConfig
    from megatron_patch.upstream.hooks import install
    from megatron_patch.upstream.patch import Session, entry_hooks, feature_hooks

    identity = WidthConfig("custom", base_hidden_size=1, lr_exponent=0.0, wd_exponent=0.0)
    install([*entry_hooks(Session()), *feature_hooks(Settings(width=identity))])


_prepare()
if os.environ["MEGATRON_SUITE_HOOKS"] == "1":
    _install_hooks()


def _note(**what: Any) -> None:
    with open(os.environ["MEGATRON_SUITE_OUTCOMES"], "a", encoding="utf-8") as file:
        print(json.dumps(what), file=file)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported is an outcome as well."""
    if report.outcome != "passed":
        _note(test=report.nodeid, outcome=f"collection {report.outcome}", why=str(report.longrepr)[-300:])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the call, and set-up and tear-down where they fail or skip."""
    if report.when == "call" or report.outcome != "passed":
        outcome = "error" if report.when != "call" and report.outcome == "failed" else report.outcome
        _note(test=report.nodeid, outcome=outcome, why="" if outcome == "passed" else str(report.longrepr)[-300:])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Give every file a fresh start: the process groups that tests leave behind hold a thread each, soon thousands."""
    yield
    if nextitem is None or nextitem.path != item.path:
        import torch
        from megatron.core import parallel_state

        from tests.unit_tests.test_utilities import Utils

        if torch.distributed.is_initialized():
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
            Utils.inited = False
