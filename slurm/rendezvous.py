"""Where the ranks of a job meet; DeepSpeed and PyTorch read no variable of Slurm's."""

import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from random import SystemRandom

from slurm import client

_PORTS = range(20_000, 30_000)
"""Below those that the kernel gives to outgoing connections."""


def rendezvous(node: str) -> dict[str, str]:
    """Return MASTER_ADDR and MASTER_PORT for a job whose first node is this one.

    Args:
        node: Slurm's name for it.

    Raises:
        client.SlurmError: It has no address, or no port is left.
    """
    return {
        "MASTER_ADDR": address(node, client.show_node(node)),
        "MASTER_PORT": str(free_port(_PORTS)),
    }


def free_port(ports: Sequence[int]) -> int:
    """Draw a port of this node that nobody listens at.

    Drawn, not derived from the job's number: other jobs on this node, other clusters' on this
    machine, and what an earlier attempt left behind must not be met. Drawn by the system's
    generator, so that no seed makes two jobs draw the same.

    Raises:
        client.SlurmError: All are taken.
    """
    for port in SystemRandom().sample(ports, len(ports)):
        with suppress(OSError), socket.create_server(("", port)):
            return port
    raise client.SlurmError(
        f"all ports from {ports[0]} to {ports[-1]} of this node are taken, so ranks have none to "
        "meet at. See with `ss -ltn` who listens there."
    )


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
