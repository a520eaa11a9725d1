"""One server of the service and one parent of recipe processes for all tests: to start one takes seconds."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """`sparsebridge serve` without a worker. Each test takes run names of its own."""
    from tests.recipes.service_server import Server, make_home

    server = Server(make_home(tmp_path_factory.mktemp("service")), "--no_worker")
    yield server
    server.close()
    assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="session")
def forks() -> Iterator[object]:
    """Starts recipes on one process or more (see `tests.recipes.forks`)."""
    from tests.recipes.forks import Forks

    with Forks() as forks:
        yield forks
