"""One Ray for all tests of the control plane that need one: it takes seconds to start."""

from collections.abc import Iterator

import pytest

from control_plane.cluster import Cluster
from control_plane.config import load


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """An embedded cluster."""
    cluster = Cluster(load())
    cluster.start()
    yield cluster
    cluster.stop()
