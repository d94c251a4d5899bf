import pytest

from trainer.errors import BadWorld
from trainer.runtime import compiled
from trainer.runtime.env import read_rank_env

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")


@pytest.fixture
def bare(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is gone afterwards
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_worker_started_by_hand_says_who_should_start_it(bare):
    with pytest.raises(BadWorld, match=r"RANK, WORLD_SIZE.* not set: .* `kiln train`"):
        read_rank_env()


def test_slurms_names_and_a_launchers_names_mean_the_same(bare):
    bare.setenv("MASTER_ADDR", "node1")
    bare.setenv("MASTER_PORT", "20001")
    for name, value in {"PROCID": "5", "NTASKS": "8", "LOCALID": "1", "RESTART_COUNT": "2"}.items():
        bare.setenv(f"SLURM_{name}", value)
    by_slurm = read_rank_env()
    assert (by_slurm.rank, by_slurm.world, by_slurm.local_rank, by_slurm.attempt) == (5, 8, 1, 2)
    bare.setenv("KILN_ATTEMPT", "3")
    assert read_rank_env().attempt == 3


def test_a_missing_compiler_is_named_with_the_way_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadWorld, match=r"finds no compiler.*apt install"):
        compiled.build_cpu_op()


def test_a_build_that_fails_shows_the_compilers_words(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ext"))
    broken = tmp_path / "bin" / "c++"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:/usr/bin:/bin")
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(BadWorld, match="did not compile"):
        compiled.build_cpu_op()
