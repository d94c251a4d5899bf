"""A real Slurm of four nodes with eight fake GPUs each, on this machine: Debian's slurm-wlm."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

from tests.tiny_source import free_port

NODES = ("node1", "node2", "node3", "node4")
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch")
HOW_TO_INSTALL = "apt-get install slurm-wlm munge"

_CONF = """
ClusterName=kiln
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
{parameters}
SlurmctldPidFile={folder}/run/ctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/ctld.log
SlurmdLogFile={folder}/log/%n.log
SlurmctldTimeout=30
SlurmdTimeout=20
KillWait=5
MinJobAge=600
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
MaxArraySize={max_array_size}
NodeName=DEFAULT CPUs=8 RealMemory=16000 Gres=gpu:8
NodeName=node[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_ports}]
PartitionName=DEFAULT Nodes=node[1-4] MaxTime=INFINITE State=UP
PartitionName=train Default=YES PriorityTier=1 GraceTime=20
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Say what this machine lacks for a cluster; None when nothing."""
    lacking = [name for name in NEEDED if shutil.which(name, path=_PATH) is None]
    if lacking:
        return f"no {', '.join(lacking)} here; as root: {HOW_TO_INSTALL}"
    return None if os.geteuid() == 0 else "a Slurm of one's own is started as root"


_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


class VirtualCluster:
    """Its daemons; with the environment that Slurm's commands need to find it."""

    def __init__(self, folder: Path, *, parameters: str = "", max_array_size: int = 1001) -> None:
        """Write its configuration.

        Args:
            folder: For everything that it writes.
            parameters: More lines of slurm.conf.
            max_array_size: As in slurm.conf.
        """
        self.folder = folder
        for name in ("munge", "run", "state", "log", *(f"spool/{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        (folder / "munge").chmod(0o711)
        key = folder / "munge/key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self.conf = folder / "slurm.conf"
        first = _free_ports(len(NODES))
        self.conf.write_text(
            _CONF.format(
                host=socket.gethostname(),
                port=free_port(),
                node_ports=f"{first}-{first + len(NODES) - 1}",
                folder=folder,
                parameters=parameters,
                max_array_size=max_array_size,
            )
        )
        (folder / "gres.conf").write_text("NodeName=node[1-4] Name=gpu File=/dev/tty[0-7]\n")
        self.env = {"SLURM_CONF": str(self.conf), "PATH": _PATH}

    def __enter__(self) -> "VirtualCluster":
        munge = self.folder / "munge"
        self._do(
            "munged",
            "--force",
            *(f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")),
            f"--socket={munge / 'sock'}",
        )
        self._do("slurmctld", "-c", "-f", str(self.conf))
        for node in NODES:
            self.start_node(node)
        self.wait_idle()
        return self

    def __exit__(self, *_: object) -> None:
        self.slurm("scancel", "--me", check=False)
        pids = [*(self.folder / "run").glob("*.pid"), self.folder / "munge/pid"]
        for path in pids:
            self._kill(path, signal.SIGTERM)
        for stepd in self._step_daemons():
            os.kill(stepd, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd; one that runs would be killed for it, and is left alone."""
        with contextlib.suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
            old = psutil.Process(int((self.folder / f"run/{node}.pid").read_text()))
            if old.name() == "slurmd" and old.status() != psutil.STATUS_ZOMBIE:
                return
        self._do("slurmd", "-c", "-N", node, "-f", str(self.conf))

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd, as a crash does; what it had started goes on."""
        self._kill(self.folder / f"run/{node}.pid", signal.SIGKILL)

    def slurm(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands."""
        done = subprocess.run(
            command, env={**os.environ, **self.env}, capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def wait_idle(self, timeout_s: float = 60) -> None:
        """Wait until all nodes can take jobs."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            states = self.slurm("sinfo", "-h", "-N", "-o", "%t", "-p", "train", check=False).split()
            if states == ["idle"] * len(NODES):
                return
            time.sleep(0.2)
        raise AssertionError(f"the cluster is not ready: {states}; logs in {self.folder}/log")

    def controller_log(self) -> str:
        """Return what the controller told of since it was started."""
        return (self.folder / "log/ctld.log").read_text(errors="replace")

    def jobs(self) -> dict[str, str]:
        """Return the states of all jobs by number."""
        told = self.slurm("squeue", "-h", "-a", "-t", "all", "-o", "%i %T")
        return dict(line.split() for line in told.splitlines())

    def _do(self, *command: str) -> None:
        self.slurm(*command)

    def _kill(self, pid_file: Path, number: int) -> None:
        try:
            os.kill(int(pid_file.read_text()), number)
        except (FileNotFoundError, ProcessLookupError, ValueError):
            return

    def _step_daemons(self) -> list[int]:
        """Find slurmstepd processes of this cluster that outlived their slurmd."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                comm = (path.parent / "comm").read_text().strip()
                if comm == "slurmstepd" and str(self.conf).encode() in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found


def _free_ports(count: int) -> int:
    """Return the first of so many free ports in a row."""
    while True:
        first = free_port()
        try:
            for port in range(first, first + count):
                with socket.socket() as sock:
                    sock.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
