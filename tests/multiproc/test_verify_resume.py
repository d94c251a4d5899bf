"""`kiln verify-resume` with real processes that are really killed."""

from multiprocessing import active_children

import pytest

from tests.latents_without_encoders import make_dataset
from trainer.cli import main
from trainer.data.loader import Pace
from trainer.data.opening import Layout
from trainer.errors import BadWorld
from trainer.verify_resume_attempts import _ranks, _take_step
from trainer.verify_resume_rank import Job

pytestmark = pytest.mark.multiproc
SIZE = (17, 25, 8, 30)


def verdict(capsys, *words, code=0):
    assert main(["verify-resume", "global_batch_images=8", *words]) == code
    return capsys.readouterr().out.splitlines()[-1]


def test_latents_resume_exactly(tmp_path, capsys):
    dataset = make_dataset(tmp_path, shard_counts=SIZE)
    said = verdict(capsys, f"dataset={dataset}", "kills=3", "worlds=[1,2]")
    assert said.startswith("identical: 23 steps of 8 latents, 3 kills, worlds ")
    assert said.endswith("2 whole epochs of 80 samples, each once")


def test_buckets_resume_exactly(tmp_path, capsys):
    dataset = make_dataset(tmp_path, shard_counts=SIZE, buckets=("32x32", "24x32"))
    said = verdict(capsys, f"dataset={dataset}", "kills=2", "worlds=[2,4]", "steps=14")
    assert said.startswith("identical: 14 steps of 8 latents, 2 kills, worlds ")
    assert said.endswith("1 whole epochs of 80 samples, each once")


def test_pictures_through_a_cache_with_bad_samples_resume_exactly(tmp_path, capsys):
    dataset = make_dataset(tmp_path, shard_counts=SIZE)
    tar = dataset / "shards/00001.tar"
    with tar.open("r+b") as file:  # a picture that is none
        file.seek(file.read().index(b"\xff\xd8\xff"))
        file.write(bytes(2000))
    words = ["encoding=pictures", f"cache={tmp_path}/cache", "kills=2", "worlds=[1,2]", "steps=13"]
    assert main(["verify-resume", f"dataset={dataset}", "global_batch_images=8", *words]) == 0
    assert " bad samples replaced" in capsys.readouterr().out


def test_a_rank_that_dies_by_itself_is_said(tmp_path):
    dataset = make_dataset(tmp_path)
    folder = tmp_path / "work"
    job = Job(str(dataset), "tiny", 32, Layout(seed=0), None, None, str(folder))
    pace = Pace(0, 2, 4, 2, threads=1, prefetch_batches=0)
    with _ranks(job, pace) as gates:
        _take_step(gates)
        assert {path.name for path in folder.iterdir()} == {"rank_0.jsonl", "rank_1.jsonl"}
        active_children()[0].kill()
        with pytest.raises(BadWorld, match=r"rank \d ended by itself"):
            _take_step(gates)
    assert not active_children()


def test_what_a_rank_refuses_is_said(tmp_path, capsys):
    dataset = make_dataset(tmp_path)
    for tar in dataset.rglob("*.tar"):
        tar.unlink()
    assert main(["verify-resume", f"dataset={dataset}", "steps=2"]) == 2
    assert "samples in a row of" in capsys.readouterr().err
