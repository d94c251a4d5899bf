"""The node's cache gives exactly the bytes of a shard, within its bound, whatever fails."""

import fcntl
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from aiohttp import ClientTimeout
from upath import UPath

from tests.range_server import range_server
from tests.s3_server import BUCKET, S3Server, needs_s3
from trainer.data.cache import Cache
from trainer.data.fetch import PIECE_BYTES, read_range
from trainer.errors import BadData, BadInput, BadWorld
from trainer.place import place

GB = 10**9


@pytest.fixture
def server():
    with range_server() as found:
        yield found


def content(seed, num_bytes=1000):
    return random.Random(seed).randbytes(num_bytes)


def sha(data):
    return hashlib.sha256(data).hexdigest()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read(cache, path, data, *, sha256=True):
    """Open the shard `path` that should have the content `data`, and give what it has."""
    needed = sha(data) if sha256 is True else sha256
    with cache.open(path, num_bytes=len(data), sha256=needed) as file:
        return file.read()


def shards(folder):
    return sorted(path for path in folder.iterdir() if path.name != "lock")


def total_bytes(folder):
    return sum(path.stat().st_size for path in shards(folder))


def claimed_bytes(folder):
    """What shards and downloads take when they are whole, at one moment."""
    with (folder / "lock").open("rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        names = {path.name.removesuffix(".partial") for path in shards(folder)}
    return sum(int(name.partition("-")[2]) for name in names)


def leave_partial(cache, folder, path, data, first_bytes):
    """Leave what a kill in mid-download leaves: the real name, with other bytes if need be."""
    read(cache, path, data)
    (whole,) = shards(folder)
    whole.rename(whole.with_name(f"{whole.name}.partial")).write_bytes(first_bytes)


@pytest.mark.parametrize("num_bytes", [1, 1000, PIECE_BYTES, PIECE_BYTES + 1, 6 * PIECE_BYTES - 7])
def test_a_shard_is_fetched_once_and_then_read_from_the_node(server, tmp_path, num_bytes):
    data = server.files["a.tar"] = content(0, num_bytes)
    cache = Cache(tmp_path / "c", max_bytes=GB)
    for _ in range(3):
        assert read(cache, place(f"{server.url}/a.tar"), data) == data
    assert server.sent_bytes["a.tar"] == num_bytes
    assert (cache.stats.misses, cache.stats.hits) == (1, 2)
    assert cache.stats.fetched_bytes == num_bytes
    assert [path.stat().st_size for path in shards(tmp_path / "c")] == [num_bytes]


def test_slow_folders_and_memory_are_cached_as_well(tmp_path):
    memory = place("memory://cached/a.tar")
    memory.write_bytes(content(1))
    local = write(tmp_path / "a.tar", content(2))
    cache = Cache(tmp_path / "c", max_bytes=GB)
    assert read(cache, memory, content(1)) == content(1)
    assert read(cache, local, content(2)) == content(2)
    local.unlink()
    assert read(cache, local, content(2)) == content(2)


def test_two_datasets_with_equal_shard_names_do_not_collide(tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    paths = [write(folder / "00000.tar", content(k)) for k, folder in enumerate(folders)]
    for needed in (True, None):
        cache = Cache(tmp_path / "c", max_bytes=GB)
        for _ in range(2):
            for k, path in enumerate(paths):
                assert read(cache, path, content(k), sha256=needed) == content(k)
    assert len(shards(tmp_path / "c")) == 4


def test_a_shard_that_was_written_anew_is_another_shard(tmp_path):
    path = write(tmp_path / "a.tar", content(1))
    cache = Cache(tmp_path / "c", max_bytes=GB)
    assert read(cache, path, content(1)) == content(1)
    write(path, content(2))
    assert read(cache, path, content(2)) == content(2)


def test_threads_that_want_one_shard_fetch_it_once(server, tmp_path):
    data = server.files["a.tar"] = content(0, 3 * PIECE_BYTES)
    caches = [Cache(tmp_path / "c", max_bytes=GB) for _ in range(2)]
    with ThreadPoolExecutor(8) as threads:
        got = threads.map(
            lambda k: read(caches[k % 2], place(f"{server.url}/a.tar"), data) == data, range(16)
        )
        assert all(got)
    assert server.sent_bytes["a.tar"] == len(data)
    assert sum(cache.stats.misses for cache in caches) == 1


def test_what_is_open_stays_readable_when_it_is_evicted(tmp_path):
    paths = [write(tmp_path / f"{k}.tar", content(k)) for k in range(3)]
    cache = Cache(tmp_path / "c", max_bytes=1000)
    with cache.open(paths[0], num_bytes=1000, sha256=sha(content(0))) as file:
        for k in (1, 2):
            assert read(cache, paths[k], content(k)) == content(k)
        assert cache.stats.evicted == 2
        assert os.pread(file.fileno(), 1000, 0) == content(0)


def test_what_was_used_longest_ago_goes_first(tmp_path):
    paths = [write(tmp_path / f"{k}.tar", content(k)) for k in range(4)]
    cache = Cache(tmp_path / "c", max_bytes=3000)
    for k in (0, 1, 2, 0, 3):  # the second use of 0 saves it
        read(cache, paths[k], content(k))
        time.sleep(0.02)
    misses = cache.stats.misses
    read(cache, paths[0], content(0))
    assert cache.stats.misses == misses
    read(cache, paths[1], content(1))
    assert cache.stats.misses == misses + 1


def test_a_smaller_bound_and_stale_downloads_give_way_and_foreign_files_stay(tmp_path):
    folder = tmp_path / "c"
    paths = [write(tmp_path / f"{k}.tar", content(k)) for k in range(5)]
    leave_partial(Cache(folder, max_bytes=GB), folder, paths[0], content(0), b"half")
    cache = Cache(folder, max_bytes=GB)
    for k in range(1, 4):
        read(cache, paths[k], content(k))
    foreign = write(folder / "my thesis.tex", b"keep")
    read(Cache(folder, max_bytes=2000), paths[4], content(4))
    assert total_bytes(folder) == 2000 + len(b"keep")
    assert foreign.exists()
    assert not list(folder.glob("*.partial"))


def test_the_bound_holds_while_threads_and_processes_fetch(tmp_path):
    """Each shard is a third of the bound: most fetches must wait for room or make it."""
    folder = tmp_path / "c"
    paths = [write(tmp_path / f"{k}.tar", content(k, 300_000)) for k in range(12)]
    code = (
        "import hashlib, random, sys\nfrom pathlib import Path\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from trainer.data.cache import Cache\n"
        "cache = Cache(Path(sys.argv[1]), max_bytes=1_000_000)\n"
        "paths = sys.argv[3:]\n"
        "def visit(k):\n"
        "    want = random.Random(k).randbytes(300_000)\n"
        "    needed = hashlib.sha256(want).hexdigest()\n"
        "    with cache.open(Path(paths[k]), num_bytes=300_000, sha256=needed) as file:\n"
        "        assert file.read() == want\n"
        "order = random.Random(sys.argv[2]).choices(range(len(paths)), k=120)\n"
        "with ThreadPoolExecutor(4) as threads:\n"
        "    list(threads.map(visit, order))\n"
        "print(cache.stats.evicted)\n"
    )
    start = [sys.executable, "-c", code, str(folder)]
    processes = [
        subprocess.Popen([*start, str(seed), *map(str, paths)], stdout=subprocess.PIPE)
        for seed in range(3)
    ]
    most_bytes, evicted = 0, []
    while any(process.poll() is None for process in processes):
        if (folder / "lock").exists():
            most_bytes = max(most_bytes, claimed_bytes(folder))
        time.sleep(0.002)
    for process in processes:
        evicted.append(int(process.communicate()[0]))
        assert process.returncode == 0
    assert 600_000 <= most_bytes <= 1_000_000
    assert total_bytes(folder) <= 1_000_000
    assert min(evicted) > 0


def test_a_download_continues_at_the_byte_where_it_stopped(server, tmp_path):
    folder, stopped_at = tmp_path / "c", PIECE_BYTES + 12_345
    data = server.files["a.tar"] = content(0, 3 * PIECE_BYTES)
    path = place(f"{server.url}/a.tar")
    leave_partial(Cache(folder, max_bytes=GB), folder, path, data, data[:stopped_at])
    server.sent_bytes.clear()
    server.ranges.clear()
    assert read(Cache(folder, max_bytes=GB), path, data) == data
    assert server.sent_bytes["a.tar"] == len(data) - stopped_at
    assert min(server.ranges) == ("a.tar", stopped_at)


def test_a_download_that_only_lacked_its_name_asks_for_nothing(server, tmp_path):
    folder, data = tmp_path / "c", content(0, 5000)
    server.files["a.tar"] = data
    path = place(f"{server.url}/a.tar")
    leave_partial(Cache(folder, max_bytes=GB), folder, path, data, data)
    server.sent_bytes.clear()
    assert read(Cache(folder, max_bytes=GB), path, data) == data
    assert not server.sent_bytes


@pytest.mark.parametrize("left", [b"rubbish", b"x" * 6000])
def test_remains_that_are_wrong_are_thrown_away(tmp_path, left):
    folder, data = tmp_path / "c", content(0, 5000)
    path = write(tmp_path / "a.tar", data)
    leave_partial(Cache(folder, max_bytes=GB), folder, path, data, left)
    assert read(Cache(folder, max_bytes=GB), path, data) == data
    assert [file.read_bytes() for file in shards(folder)] == [data]


def test_remains_of_a_shard_without_a_hash_are_not_trusted(tmp_path):
    folder, data = tmp_path / "c", content(0, 5000)
    path = write(tmp_path / "a.tar", data)
    cache = Cache(folder, max_bytes=GB)
    read(cache, path, data, sha256=None)
    (whole,) = shards(folder)
    whole.rename(whole.with_name(f"{whole.name}.partial")).write_bytes(b"another content")
    assert read(cache, path, data, sha256=None) == data


def test_a_file_of_the_cache_that_was_cut_is_fetched_again(tmp_path):
    path = write(tmp_path / "a.tar", content(0))
    cache = Cache(tmp_path / "c", max_bytes=GB)
    read(cache, path, content(0))
    (whole,) = shards(tmp_path / "c")
    whole.write_bytes(b"cut")
    assert read(cache, path, content(0)) == content(0)
    assert cache.stats.misses == 2


def test_a_folder_that_was_emptied_in_mid_run_is_filled_again(tmp_path):
    path = write(tmp_path / "a.tar", content(0))
    cache = Cache(tmp_path / "c", max_bytes=GB)
    for _ in range(2):
        assert read(cache, path, content(0)) == content(0)
        for file in (tmp_path / "c").iterdir():
            file.unlink()
        (tmp_path / "c").rmdir()
    assert cache.stats.misses == 2


def test_a_wrong_hash_is_fetched_once_more_whole_and_then_named(server, tmp_path):
    data = server.files["a.tar"] = content(0, 5000)
    path = place(f"{server.url}/a.tar")
    cache = Cache(tmp_path / "c", max_bytes=GB)
    for _ in range(3):
        with pytest.raises(BadData, match=rf"{path} has sha256 {sha(data)}, need {'0' * 64}.*Copy"):
            cache.open(path, num_bytes=5000, sha256="0" * 64)
    assert server.sent_bytes["a.tar"] == 2 * 5000  # not for every sample
    assert not shards(tmp_path / "c")
    assert cache.stats.retries == 1


@pytest.mark.parametrize("num_bytes", [999, 1001, PIECE_BYTES, PIECE_BYTES + 1])
@pytest.mark.parametrize("where", ["http", "memory", "local"])
def test_a_shard_of_another_size_is_refused_even_without_a_hash(server, tmp_path, num_bytes, where):
    other = {999: 1000, 1001: 1000, PIECE_BYTES: PIECE_BYTES + 1, PIECE_BYTES + 1: PIECE_BYTES}
    data = server.files["a.tar"] = content(0, other[num_bytes])
    place("memory://sizes/a.tar").write_bytes(data)
    path = {
        "http": place(f"{server.url}/a.tar"),
        "memory": place("memory://sizes/a.tar"),
        "local": write(tmp_path / "a.tar", data),
    }[where]
    with pytest.raises(BadData, match=rf"has (at least )?{len(data)} bytes, need {num_bytes}"):
        Cache(tmp_path / "c", max_bytes=GB).open(path, num_bytes=num_bytes, sha256=None)
    assert not shards(tmp_path / "c")


@pytest.mark.parametrize("where", ["{http}/no.tar", "memory://none/no.tar", "{tmp}/no.tar"])
def test_a_shard_that_vanished_is_bad_data(server, tmp_path, where):
    path = place(where.format(http=server.url, tmp=tmp_path))
    with pytest.raises(BadData, match=r"no\.tar is not there\. Copy it again"):
        Cache(tmp_path / "c", max_bytes=GB).open(path, num_bytes=9, sha256=None)


@pytest.mark.parametrize("faults", [["cut"], [503], ["cut", 500, "cut"], [429, 408]])
def test_faults_that_pass_are_sat_out_and_counted(server, tmp_path, faults):
    data = server.files["a.tar"] = content(0, 300_000)
    server.faults += faults
    cache = Cache(tmp_path / "c", max_bytes=GB)
    assert read(cache, place(f"{server.url}/a.tar"), data) == data
    assert cache.stats.retries == len(faults)


def test_a_server_that_hangs_is_asked_again(server, tmp_path):
    data = server.files["a.tar"] = content(0)
    server.faults += ["hang"]
    hasty = UPath(f"{server.url}/a.tar", client_kwargs={"timeout": ClientTimeout(sock_read=0.3)})
    cache = Cache(tmp_path / "c", max_bytes=GB, patience_s=0.1)  # once at least
    assert read(cache, hasty, data) == data
    assert cache.stats.retries == 1


def test_a_slow_server_is_no_error(server, tmp_path):
    data = server.files["a.tar"] = content(0, 400_000)
    server.bytes_per_s = 400_000
    cache = Cache(tmp_path / "c", max_bytes=GB)
    assert read(cache, place(f"{server.url}/a.tar"), data) == data
    assert cache.stats.retries == 0


def test_a_storage_that_never_answers_ends_in_bounded_time_and_the_download_is_kept(
    server, tmp_path
):
    data = server.files["a.tar"] = content(0, 3 * PIECE_BYTES)
    path = place(f"{server.url}/a.tar")
    folder = tmp_path / "c"
    leave_partial(Cache(folder, max_bytes=GB), folder, path, data, data[:PIECE_BYTES])
    server.faults += [500] * 100
    started_s = time.monotonic()
    with pytest.raises(BadWorld, match=r"a\.tar: the storage cannot be reached.*same command"):
        read(Cache(folder, max_bytes=GB, patience_s=0.2), path, data)
    assert time.monotonic() - started_s < 20
    assert [file.stat().st_size for file in shards(folder)] == [PIECE_BYTES]


def test_processes_forked_in_mid_download_hold_no_lock_on_it(server, tmp_path):
    data = server.files["a.tar"] = content(0)
    path = place(f"{server.url}/a.tar")
    cache = Cache(tmp_path / "c", max_bytes=GB, patience_s=0.5)
    server.faults += [500] * 100
    with ThreadPoolExecutor(1) as threads:
        failing = threads.submit(read, cache, path, data)
        while len(server.faults) > 98:
            time.sleep(0.01)
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        try:
            with pytest.raises(BadWorld):
                failing.result()
            server.faults.clear()
            assert read(cache, path, data) == data
            assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it still lives
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("fault", "says"),
    [(403, "may not be read: .*403.*Get the right to"), ("whole", "ignores ranges. Copy the data")],
)
def test_a_server_that_refuses_is_told_from_bad_data_and_not_asked_again(
    server, tmp_path, fault, says
):
    data = server.files["a.tar"] = content(0, 2 * PIECE_BYTES)
    server.faults += [fault] * 2
    cache = Cache(tmp_path / "c", max_bytes=GB)
    with pytest.raises(BadInput, match=says) as found:
        read(cache, place(f"{server.url}/a.tar"), data)
    assert not isinstance(found.value, BadData)
    assert cache.stats.retries == 0


def test_a_mount_that_fails_is_the_world_and_a_folder_is_bad_data(tmp_path):
    cache = Cache(tmp_path / "c", max_bytes=GB, patience_s=0.1)
    with pytest.raises(BadWorld, match=r"cannot be reached or breaks off .*same command"):
        cache.open(Path("/proc/self/mem"), num_bytes=100, sha256=None)
    with pytest.raises(BadData, match="is not there"):
        cache.open(tmp_path, num_bytes=100, sha256=None)


def test_a_shard_that_does_not_fit_names_the_setting(tmp_path):
    cache = Cache(tmp_path / "c", max_bytes=GB)
    with pytest.raises(BadInput, match=r"data\.cache_gb=1 has no room.*data\.cache_gb=3 or more"):
        cache.open(tmp_path / "a.tar", num_bytes=2 * GB + 1, sha256=None)


def test_a_folder_that_cannot_be_used_names_the_setting(tmp_path):
    blocked = write(tmp_path / "file", b"")
    for folder in (blocked, blocked / "below", Path("/proc/kiln")):
        with pytest.raises(BadInput, match=r"data\.cache=.* cannot be used.*Need a folder"):
            Cache(folder, max_bytes=GB)


def test_a_full_disk_takes_the_room_of_other_shards(tiny_disk, tmp_path):
    paths = [write(tmp_path / f"{k}.tar", content(k, 800_000)) for k in range(5)]
    cache = Cache(tiny_disk / "c", max_bytes=GB)
    for k in (0, 1, 2, 3, 4, 0):
        assert read(cache, paths[k], content(k, 800_000)) == content(k, 800_000)
    assert cache.stats.evicted > 0


def test_a_disk_that_stays_full_names_the_setting_and_is_left_as_it_was(tiny_disk, tmp_path):
    path = write(tmp_path / "a.tar", content(0, 3_000_000))
    cache = Cache(tiny_disk / "c", max_bytes=GB)
    with pytest.raises(BadWorld, match=r"disk of data\.cache=.* is full.*\d+ bytes are free.*Free"):
        read(cache, path, content(0, 3_000_000))
    assert not shards(tiny_disk / "c")


def test_a_range_has_all_of_its_bytes_or_is_an_error(server, tmp_path):
    data = server.files["a"] = content(0, 5000)
    place("memory://ranges/a").write_bytes(data)
    paths = [place(f"{server.url}/a"), place("memory://ranges/a"), write(tmp_path / "a", data)]
    for path in paths:
        assert read_range(path, 0, 5000) == data
        assert read_range(path, 17, 4000) == data[17:4000]
        assert read_range(path, 17, 17) == b""
        for start, end in ((4000, 5001), (5000, 5001), (9000, 9001)):
            with pytest.raises(BadData, match=f"is cut: found .* need at least {end}"):
                read_range(path, start, end)


def test_ranges_sit_out_broken_bodies(server):
    data = server.files["a"] = content(0, 500_000)
    server.faults += ["cut", 502]
    tried = []
    path = place(f"{server.url}/a")
    assert read_range(path, 5, 400_000, on_retry=lambda: tried.append(1)) == data[5:400_000]
    assert len(tried) == 2


@needs_s3
@pytest.mark.e2e
def test_shards_of_an_s3_server_through_its_restart(tmp_path, monkeypatch):
    s3fs = pytest.importorskip("s3fs")
    server = S3Server(tmp_path / "s3")
    try:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        data = {f"{k}.tar": content(k, 3 * PIECE_BYTES + k) for k in range(2)}
        for name, body in data.items():
            server.client("writer").pipe_file(f"{BUCKET}/set/{name}", body)
        cache = Cache(tmp_path / "c", max_bytes=GB)
        root = place(f"s3://{BUCKET}/set")
        assert read(cache, root / "0.tar", data["0.tar"]) == data["0.tar"]
        with pytest.raises(BadData, match=r"2\.tar is not there"):
            cache.open(root / "2.tar", num_bytes=9, sha256=None)
        for more in (-1, 1):
            with pytest.raises(BadData, match=f"bytes, need {len(data['1.tar']) + more}"):
                cache.open(root / "1.tar", num_bytes=len(data["1.tar"]) + more, sha256=None)
        with pytest.raises(BadData, match="is cut"):
            read_range(root / "0.tar", 10**9, 10**9 + 5)
        with pytest.raises(BadInput, match=r"AccessDenied|NoSuchBucket"):
            cache.open(place("s3://other/a.tar"), num_bytes=9, sha256=None)
        server.kill()
        starter = threading.Timer(1, server.start)
        starter.start()
        assert read(cache, root / "1.tar", data["1.tar"]) == data["1.tar"]
        starter.join()
    finally:
        server.close()
        s3fs.S3FileSystem.clear_instance_cache()
