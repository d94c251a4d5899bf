"""Sixteen processes on one cache that are killed at random leave it valid."""

import hashlib
import multiprocessing
import random
import re
import signal
import time

import pytest

from trainer.data.cache import Cache

pytestmark = pytest.mark.multiproc

NUM_PROCESSES = 16
NUM_KILLS = 60
NUM_SHARDS = 10
NUM_BYTES = 9_000_000  # three pieces
MAX_BYTES = 7 * NUM_BYTES + 1000


def content(k):
    return random.Random(k).randbytes(NUM_BYTES)


def sha(data):
    return hashlib.sha256(data).hexdigest()


def visit(folder, paths, hashes, log, seed):
    """Open random shards and note it; end in another way than by a kill if one is wrong."""
    cache = Cache(folder, max_bytes=MAX_BYTES)
    draws = random.Random(seed)
    while True:
        k = draws.randrange(NUM_SHARDS)
        with cache.open(paths[k], num_bytes=NUM_BYTES, sha256=hashes[k]) as file:
            assert sha(file.read()) == hashes[k]
        with log.open("a") as notes:
            notes.write(f"{cache.stats.misses}\n")


def claimed_bytes(folder):
    names = [path.name for path in folder.iterdir() if path.name != "lock"]
    return sum(int(re.fullmatch(r"[0-9a-f]{32}-(\d+)(\.partial)?", name)[1]) for name in names)


def shards(root):
    """Write shards of as many datasets; give their paths and hashes."""
    hashes = [sha(content(k)) for k in range(NUM_SHARDS)]
    paths = [root / str(k) / "00000.tar" for k in range(NUM_SHARDS)]
    for k, path in enumerate(paths):
        path.parent.mkdir()
        path.write_bytes(content(k))
    return paths, hashes


def run_and_kill(start):
    """Keep all processes running, killing one after the other, then all; give how they ended."""
    draws, ends = random.Random(0), []
    processes = [start() for _ in range(NUM_PROCESSES)]
    try:
        for _ in range(NUM_KILLS):
            time.sleep(draws.uniform(0, 0.15))
            victim = processes.pop(draws.randrange(NUM_PROCESSES))
            victim.kill()
            victim.join()
            ends.append(victim.exitcode)
            processes.append(start())
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    return ends + [process.exitcode for process in processes]


def test_sixteen_processes_under_random_kills_leave_the_cache_valid(tmp_path):
    folder, log = tmp_path / "c", tmp_path / "log"
    paths, hashes = shards(tmp_path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    seeds = iter(range(NUM_PROCESSES + NUM_KILLS))

    def start():
        args = (folder, paths, hashes, log, next(seeds))
        process = context.Process(target=visit, args=args)
        process.start()
        return process

    assert set(run_and_kill(start)) == {-signal.SIGKILL}
    notes = log.read_text().split()
    assert len(notes) > NUM_KILLS
    assert max(map(int, notes)) > 0
    assert claimed_bytes(folder) <= MAX_BYTES
    whole = [path for path in folder.iterdir() if path.name.endswith(str(NUM_BYTES))]
    assert all(sha(path.read_bytes()) in hashes for path in whole)

    cache = Cache(folder, max_bytes=MAX_BYTES)
    started_s = time.monotonic()
    for path, needed in 2 * list(zip(paths, hashes, strict=True)):
        with cache.open(path, num_bytes=NUM_BYTES, sha256=needed) as file:
            assert sha(file.read()) == needed
    assert time.monotonic() - started_s < 60  # no lock is left
    assert claimed_bytes(folder) <= MAX_BYTES
    assert not [path for path in folder.iterdir() if path.name.endswith(".partial")]
