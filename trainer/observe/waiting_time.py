"""How long a command's job waited in the queue: handed to its account in the environment."""

import os
from typing import NamedTuple

_NAME = "KILN_WAITED_UNIX_S"


class Waited(NamedTuple):
    """Since when a job might have begun, and when it did, in Unix seconds."""

    since_unix_s: float
    until_unix_s: float


def hand_over(waited: Waited) -> dict[str, str]:
    """Return the variable that tells a command of it."""
    return {_NAME: " ".join(map(repr, waited))}


def take_waited() -> Waited | None:
    """Return it, and take the variable away: the first account that a command opens has it."""
    told = os.environ.pop(_NAME, None)
    return None if told is None else Waited(*map(float, told.split()))
