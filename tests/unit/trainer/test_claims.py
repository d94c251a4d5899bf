"""Laws of sharing work between processes."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

from trainer.claims import STALE_AFTER_S, claimed, locked_folder, owner

CLAIM_AND_DIE = """
import os, sys
from pathlib import Path
from trainer.claims import claimed
with claimed(Path(sys.argv[1])) as mine:
    assert mine
    os._exit(9)
"""
CLAIM_AND_WAIT = """
import sys
from pathlib import Path
from trainer.claims import claimed
with claimed(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def test_of_many_at_once_one_gets_the_claim_and_it_goes_with_the_block(tmp_path):
    path, got, together = tmp_path / "work/step.claim", [], threading.Barrier(8)

    def work():
        together.wait()
        with claimed(path) as mine:
            got.append(mine)
            together.wait()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]
    assert not path.exists()
    with claimed(path) as mine:
        assert mine


def test_a_claim_goes_with_an_exception_too(tmp_path):
    path = tmp_path / "claim"
    try:
        with claimed(path):
            raise KeyError
    except KeyError:
        assert not path.exists()


def test_a_live_process_keeps_its_claim_and_is_named(tmp_path):
    path = tmp_path / "claim"
    words = [sys.executable, "-c", CLAIM_AND_WAIT, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"True\n"
        with claimed(path) as mine:
            assert not mine
        assert owner(path) == f"process {process.pid} on {socket.gethostname()}"
        process.stdin.close()
        process.wait()
    assert not path.exists()


def test_the_claim_of_a_dead_process_is_taken_over(tmp_path, caplog):
    path = tmp_path / "claim"
    subprocess.run([sys.executable, "-c", CLAIM_AND_DIE, str(path)], check=False)
    assert path.exists()
    with claimed(path) as mine:
        assert mine
    assert "is gone; its work is taken over" in caplog.text


def test_another_process_with_the_same_id_is_not_the_owner(tmp_path):
    path = tmp_path / "claim"
    told = {"host": socket.gethostname(), "pid": os.getpid(), "born_unix_s": 1.0}
    path.write_text(json.dumps(told))
    with claimed(path) as mine:
        assert mine


def test_another_hosts_claim_counts_while_it_is_renewed(tmp_path):
    path = tmp_path / "claim"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "born_unix_s": 1.0}))
    with claimed(path) as mine:
        assert not mine
    old_s = time.time() - STALE_AFTER_S - 5
    os.utime(path, (old_s, old_s))
    with claimed(path) as mine:
        assert mine


def test_a_claim_that_was_cut_off_is_nobodys(tmp_path):
    path = tmp_path / "claim"
    path.write_text('{"host": "el')
    assert owner(path) == "another process"
    with claimed(path) as mine:
        assert mine


def test_a_locked_folder_is_entered_by_one_at_a_time(tmp_path):
    inside, most = [], []

    def work():
        with locked_folder(tmp_path / "new"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5
