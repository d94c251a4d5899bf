"""A rank without torch that ends in one of several ways, for the tests of what started it."""

import os
import signal
import sys
import time
from pathlib import Path

from trainer.runtime.ending import write_failure, write_stuck

RANK = int(os.environ["RANK"])
LOST = "RuntimeError: [/gloo/pair.cc] Connection closed by peer"


def dies_unheard(_folder):
    if RANK == 1:
        raise RuntimeError("the disk of rank 1 is on fire")
    time.sleep(60)


def fails_slowly(folder):
    """Rank 1 fails first, but takes longer to end than the one that fails from it."""
    if RANK == 0:
        time.sleep(0.3)
    error = LOST if RANK == 0 else "RuntimeError: the disk of rank 1 is on fire"
    write_failure(folder, RANK, error, is_echo=RANK == 0)
    sys.stderr.write(f"{error}\n")
    if RANK == 1:
        time.sleep(0.8)
        sys.stderr.write("[W] something is destroyed\n")
    return 1


def rank_0_fails(folder):
    error = "RuntimeError: the disk of rank 0 is on fire" if RANK == 0 else LOST
    write_failure(folder, RANK, error, is_echo=RANK == 1)
    return 1


def is_killed(folder):
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    write_failure(folder, RANK, LOST, is_echo=True)
    return 1


def refuses(folder):
    write_failure(folder, RANK, "the dataset is not there", is_echo=False)
    return 2


def is_stuck(folder):
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    write_stuck(folder, "rank 1 was stuck")
    return 85


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](Path(sys.argv[2])))
