"""Where the ranks of a job meet; DeepSpeed and PyTorch read no variable of Slurm's."""

import socket
from collections.abc import Callable, Mapping

from slurm import client

_FIRST_PORT, _PORTS = 20000, 10000
"""Below those that the kernel gives to outgoing connections."""


def rendezvous(node: str, job_id: int, attempt: int) -> dict[str, str]:
    """Return MASTER_ADDR and MASTER_PORT.

    Args:
        node: The first of the job.
        job_id: Two jobs on one node must not meet each other.
        attempt: Nor may what an earlier attempt left behind.
    """
    return {
        "MASTER_ADDR": address(node, client.show_node(node)),
        "MASTER_PORT": str(_FIRST_PORT + (job_id + 97 * attempt) % _PORTS),
    }


def address(
    node: str, told: Mapping[str, str], resolves: Callable[[str], bool] | None = None
) -> str:
    """Choose what other nodes can reach a node by.

    Args:
        node: Slurm's name for it.
        told: What Slurm says of it.
        resolves: Whether a name has an address; by default the resolver is asked.

    Raises:
        client.SlurmError: None of its names resolves.
    """
    resolves = resolves or _resolves
    names = (told.get("NodeAddr", node), node, told.get("NodeHostName", node))
    for name in names:
        if resolves(name):
            return name
    raise client.SlurmError(
        f"no name of node {node} ({', '.join(dict.fromkeys(names))}) has an address here, so its "
        "ranks cannot be found. Ask the site for NodeAddr in slurm.conf, or for names in DNS."
    )


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True
