"""The ranks of this folder's tests find DeepSpeed imported."""

import pytest

from tests.support.pool import Pool


@pytest.fixture(scope="session")
def pool(deepspeed_pool: Pool) -> Pool:
    return deepspeed_pool
