"""How long is a job away, between the end of one attempt and the beginning of the next?"""

import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.harness import claim_at_most, row_of, write_result
from slurm import client
from slurm.attempts import read_attempts
from tests.cluster.jobs import (
    job_of,
    ranks,
    spec_of,
    state,
    submit,
    supervised,
    wait_for,
    wait_running,
)
from tests.virtual_cluster import VirtualCluster, missing

REPETITIONS = 5
PLAIN, WATCHED = "scontrol requeue", "kiln supervise"
METRICS = ("from the end of the attempt", "from when Slurm knew")
Gaps = dict[str, float]
How = Callable[[VirtualCluster, Path, str], Gaps]


def away(run: Path, job_id: str, left_unix_s: float) -> Gaps:
    """Wait for the second attempt; tell how long that took, and how long Slurm did not notice."""
    wait_for(lambda: state(job_id) == "PENDING", "the job in the queue", 300)
    noticed_unix_s = time.time()
    again = wait_running(run, 1, count=2, timeout_s=300)
    return {
        METRICS[0]: again.begin.unix_s - left_unix_s,
        METRICS[1]: max(0.0, again.begin.unix_s - noticed_unix_s),
    }


def stopped(cluster: VirtualCluster, run: Path, job_id: str) -> Gaps:
    """Tell the ranks to save; the batch script requeues the job."""
    cluster.slurm("scancel", "--signal=USR2", job_id)
    end = wait_for(lambda: read_attempts(run)[0].end, "the end of the attempt")
    return away(run, job_id, end.unix_s)


def crashed(_cluster: VirtualCluster, run: Path, job_id: str) -> Gaps:
    """Kill a rank; the batch script requeues the job."""
    os.kill(ranks(read_attempts(run)[0])[0]["pid"], signal.SIGKILL)
    end = wait_for(lambda: read_attempts(run)[0].end, "the end of the attempt")
    return away(run, job_id, end.unix_s)


def node_killed(cluster: VirtualCluster, run: Path, job_id: str) -> Gaps:
    """Kill a node's slurmd; Slurm requeues the job when it has waited for SlurmdTimeout."""
    node = read_attempts(run)[0].begin.nodes[1]
    killed_unix_s = time.time()
    cluster.kill_node(node)
    gaps = away(run, job_id, killed_unix_s)
    cluster.start_node(node)
    return gaps


JOB_CASES: dict[str, How] = {"saved at a signal": stopped, "a rank was killed": crashed}
NODE_CASE = "a node's slurmd was killed"


def measure(cluster: VirtualCluster, how: How, *, watched: bool) -> Gaps:
    """Run a job, end its first attempt, and wait for the second."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        with supervised(run.parent) if watched else contextlib.nullcontext():
            job = job_of(run, tasks_per_node=1, gpus_per_node=1)
            job_id = submit(run, job, spec_of(run, ranks_per_node=1))
            wait_running(run, count=2)
            gaps = how(cluster, run, job_id)
            (run / "finish").touch()
            wait_for(lambda: state(job_id) == "COMPLETED", "the job's end")
    return gaps


@contextlib.contextmanager
def cluster_here() -> Iterator[VirtualCluster]:
    """Start a Slurm for this process."""
    reason = missing()
    if reason is not None:
        sys.exit(f"restart: {reason}")
    with (
        tempfile.TemporaryDirectory() as folder,
        VirtualCluster(Path(folder) / "cluster") as cluster,
    ):
        os.environ.update(cluster.env)
        yield cluster


def measure_all(cluster: VirtualCluster) -> dict[tuple[str, str], list[Gaps]]:
    """Measure all cases with and without the supervisor; jobs that Slurm holds wait beside."""
    found: dict[tuple[str, str], list[Gaps]] = {}
    rounds = range(REPETITIONS)
    with ThreadPoolExecutor(REPETITIONS * len(JOB_CASES)) as beside:
        held = [
            (case, beside.submit(measure, cluster, how, watched=False))
            for case, how in JOB_CASES.items()
            for _ in rounds
        ]
        for case, how in [each for _ in rounds for each in JOB_CASES.items()]:
            found.setdefault((case, WATCHED), []).append(measure(cluster, how, watched=True))
        for case, future in held:
            found.setdefault((case, PLAIN), []).append(future.result())
    for system in [each for _ in rounds for each in (PLAIN, WATCHED)]:
        cluster.wait_idle()
        gaps = measure(cluster, node_killed, watched=system == WATCHED)
        found.setdefault((NODE_CASE, system), []).append(gaps)
    return found


def main() -> int:
    """Measure, and write the result."""
    with cluster_here() as cluster:
        version = client.run("sinfo", "--version").split()[-1]
        found = measure_all(cluster)
    rows = [
        row_of(
            [gap[metric] for gap in gaps],
            case=f"{case}; Slurm {version}, four idle nodes",
            system=system,
            metric=metric,
            unit="s",
        )
        for (case, system), gaps in sorted(found.items())
        for metric in METRICS
    ]
    claims = [
        claim_at_most(
            f"{case}: seconds from when Slurm knew to the next attempt, under kiln supervise",
            measured=statistics.median(gap[METRICS[1]] for gap in found[case, WATCHED]),
            target=5.0,
        )
        for case in (*JOB_CASES, NODE_CASE)
    ]
    write_result("restart", question=str(__doc__), rows=rows, claims=claims)
    return 0


if __name__ == "__main__":
    sys.exit(main())
