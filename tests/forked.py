"""Ranks that start at once: forked from a server that has imported everything, seconds saved each.

How ranks are really started (`trainer.runtime.local`) is tested by the end-to-end tests.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from multiprocessing.connection import wait

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])


def run_forked(main, *args, num_ranks, log_dir, others_s=None):
    """Run `main(*args)` once per rank and wait; returns what they returned, 0 for None.

    With `others_s`, ranks that still run so many seconds after the first one ended are killed.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ranks = []
    for rank in range(num_ranks):
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        log = log_dir / f"rank_{rank}.log"
        ranks.append(CONTEXT.Process(target=_rank, args=(main, args, env, log)))
        ranks[-1].start()
    wait([process.sentinel for process in ranks])
    deadline_s = None if others_s is None else time.monotonic() + others_s
    for process in ranks:
        process.join(deadline_s and max(0.0, deadline_s - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in ranks]


def _rank(main, args, env, log):
    os.environ.update(env)
    with log.open("ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        code = main(*args) or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
