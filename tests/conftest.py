"""Fixtures for all tests."""

from collections.abc import Iterator

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The session's pool of worker processes; see tests/pool.py."""
    pool = Pool()
    yield pool
    pool.close()
