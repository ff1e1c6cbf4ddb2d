"""Where the workers of a test run: on this machine, or behind Ray."""

import pytest

from empg_jax.workers.ray_backend import RayCluster
from tests.workers import pools
from tests.workers.clusters import open_cluster


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray cluster of this test process alone, with one node."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    with open_cluster() as cluster:
        yield RayCluster(cluster.address, {"CPU": 0.01})
        ray.shutdown()


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    """Runs a test with local workers, and once more with Ray's."""
    if request.param == "ray":
        monkeypatch.setattr(pools, "START", request.getfixturevalue("ray_cluster").start)
    return request.param
