"""Two hosts for the tests of this folder; without root, sshd, pdsh or namespaces they are skipped, with the reason."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.two_hosts import TwoHosts, missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder; `make test-hosts` runs them."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.hosts)


@pytest.fixture(scope="session")
def possible() -> None:
    """Skips where hosts cannot be made."""
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture
def hosts(possible: None, tmp_path: Path) -> Iterator[TwoHosts]:
    """A pair of its own for a test, so that what one test leaves behind is in no other's way."""
    folder = tmp_path / "pair"
    folder.mkdir()
    with TwoHosts(folder) as pair:
        yield pair
