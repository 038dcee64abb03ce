"""One Ray for all tests of the control plane that need one: it takes seconds to start."""

from collections.abc import Iterator

import pytest

from control_plane.cluster import Cluster
from control_plane.config import load


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """An embedded cluster, started as in a container without a home folder."""
    cluster = Cluster(load())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", "/nonexistent")
        cluster.start()
    yield cluster
    folder = cluster.folder
    cluster.stop()
    assert folder is not None
    assert not folder.exists()
