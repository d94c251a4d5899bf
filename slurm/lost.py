"""Attempts that ended without a word: their node died, or somebody killed the batch script."""

import time
from collections.abc import Mapping, Sequence

from slurm import client
from slurm.attempts import Attempt, End, end_attempt
from slurm.runfile import saved_step

_BAD = ("DOWN", "FAIL", "DRAIN", "NOT_RESPONDING", "UNKNOWN", "REBOOT", "POWER")


def close_lost(attempts: Sequence[Attempt]) -> None:
    """Write down, of the attempts of a job that is not running, which were lost and why."""
    for attempt in attempts:
        if attempt.end is None:
            end_attempt(attempt, why_lost(attempt, node_states(attempt.begin.nodes)))


def why_lost(attempt: Attempt, states: Mapping[str, str]) -> End:
    """Blame the nodes that are not well.

    Args:
        attempt: One without an end.
        states: What Slurm says of its nodes now, e.g. `down* Not responding`.
    """
    bad = {node: state for node, state in states.items() if _is_bad(state)}
    words = "; ".join(f"{node} is {state}" for node, state in bad.items())
    return End(
        cause="lost",
        why=words or "its batch script ended without a word; the nodes are well now",
        unix_s=time.time(),
        saved_step=saved_step(attempt.folder.parents[1]),
        suspects=dict.fromkeys(bad, 1.0),
    )


def node_states(nodes: Sequence[str]) -> dict[str, str]:
    """Ask Slurm how nodes are."""
    told = client.run(
        "sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%T|%E"
    )
    states = {}
    for line in told.splitlines():
        node, state, reason = line.split("|", 2)
        states[node] = state if reason == "none" else f"{state} ({reason})"
    return states


def _is_bad(state: str) -> bool:
    word = state.split(" ", maxsplit=1)[0].upper()
    return word.endswith("*") or any(bad in word for bad in _BAD)
