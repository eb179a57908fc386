"""One cluster for all tests of this folder, emptied after each of them."""

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import TOOLS, Cluster


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    """A cluster of two nodes; without Slurm on this machine the tests are skipped, or fail with LDM_REQUIRE_ALL=1."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if os.geteuid():
        missing.append("root")
    if missing:
        reason = f"needs {', '.join(missing)}: apt-get install munge slurmctld slurmd slurm-client iproute2, as root"
        pytest.fail(reason) if os.environ.get("LDM_REQUIRE_ALL") == "1" else pytest.skip(reason)
    with Cluster.start(nodes=2) as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The running cluster, for the commands of this process too."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(running_cluster.config))
    yield running_cluster
    running_cluster.cancel_all()
