"""One cluster for all tests of this folder, emptied after each of them."""

import os
from collections.abc import Iterator

import pytest

from tests.requirements import leave_out, require_root, require_tool
from tests.slurm.cluster import TOOLS, Cluster
from tests.slurm.machine import refusal_of_namespaces

INSTALL = "apt-get install --no-install-recommends munge slurmctld slurmd slurm-client iproute2"


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    """A cluster of four nodes, up after a second."""
    require_root()
    for tool in TOOLS:
        require_tool(tool, INSTALL)
    with Cluster.start(nodes=4) as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The running cluster, for the commands of this process too."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(running_cluster.config))
    yield running_cluster
    running_cluster.cancel_all()


@pytest.fixture
def network(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster whose nodes can be killed and cut off; all are back afterwards."""
    if cluster.mode != "netns":
        refusal = refusal_of_namespaces()
        if refusal:  # A right of the machine that nothing installs: not a failure where it is not given.
            pytest.skip(f"needs network namespaces, which this machine refuses: {refusal}")
        leave_out(f"needs network namespaces, and the cluster came up without: {cluster.failures}")
    yield cluster
    cluster.heal()
