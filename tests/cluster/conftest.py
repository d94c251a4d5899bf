"""A real Slurm for the tests of jobs; without it they say what to install, and in CI they fail."""

import sys

import pytest

from tests.conftest import skip_unless_ci
from tests.virtual_cluster import NODES, VirtualCluster, missing


@pytest.fixture(scope="session")
def virtual_cluster(tmp_path_factory):
    reason = missing()
    if reason is not None:
        skip_unless_ci(reason)
    with VirtualCluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture
def cluster(virtual_cluster, monkeypatch):
    """The cluster with all nodes idle; Slurm's commands of this test find it."""
    for name, value in virtual_cluster.env.items():
        monkeypatch.setenv(name, value)
    yield virtual_cluster
    seen = virtual_cluster.slurm("squeue", "-a", "-t", "all", check=False)
    sys.stdout.write(seen + virtual_cluster.controller_log()[-10_000:])  # beside a failure
    virtual_cluster.slurm("scancel", "--me", check=False)
    for node in NODES:
        virtual_cluster.start_node(node)
        update = ("scontrol", "update", f"NodeName={node}", "State=RESUME")
        virtual_cluster.slurm(*update, check=False)
    virtual_cluster.wait_idle()
