"""Whether the package emerging-optimizers is there: Muon, SOAP and Lion come from it, in Megatron too."""

import importlib.util

import pytest

needs_emerging_optimizers = pytest.mark.skipif(
    importlib.util.find_spec("emerging_optimizers") is None,
    reason="needs emerging-optimizers, which the extras `dev` and `muon` install",
)
