import itertools
import pickle
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import webdataset as wds

from tests.foreign_tars import img2dataset_tar, picture, write_tar
from tests.tiny_dataset import scenes_dataset
from trainer.data.decode import decode_square
from trainer.data.foreign import foreign_batches
from trainer.data.manifest import load_manifest
from trainer.data.shards import Shard, key_ids, read_index
from trainer.errors import BadInput

ROWS, SIDE_PX = 8, 16


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        img2dataset_tar(tmp_path / f"{number:05d}.tar", number, ROWS)
    return tmp_path


def batches(folder, *names, **options):
    options = {
        "seed": 1,
        "images_seen": 0,
        "rank": 0,
        "world": 1,
        "micro_batch_images": 4,
        "epoch_images": 4 * ROWS,
        "side_px": SIDE_PX,
        "device": torch.device("cpu"),
        "shuffle_buffer": 10,
    } | options
    return foreign_batches(names or [f"{folder}/*.tar"], **options)


def ids(some):
    return torch.cat([batch.ids_B for batch in some]).tolist()


def take(stream, count):
    got = list(itertools.islice(stream, count))
    stream.close()
    return got


def all_ids():
    return key_ids([f"{n:05d}{row:04d}" for n in range(4) for row in range(ROWS)]).tolist()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_published_tars_unchanged_and_in_order(tmp_path):
    dataset = scenes_dataset(tmp_path / "d", num_shards=3)
    entries = load_manifest(dataset).shards
    read = list(wds.WebDataset([str(e.tar(dataset)) for e in entries], shardshuffle=False))
    expected = []
    for entry in entries:
        with Shard(entry.tar(dataset), read_index(entry.index(dataset))) as shard:
            for row, key in enumerate(shard.keys):
                members = {ext: shard.read(row, ext) for ext in shard.extensions(row)}
                expected.append({"__key__": key, **members})
    own = {"__url__", "__local_path__"}
    assert [{k: v for k, v in sample.items() if k not in own} for sample in read] == expected
    assert len(read) == 18


def test_a_pass_over_all_ranks_has_every_picture_once_and_as_it_decodes(folder):
    parts = [take(batches(folder, rank=rank, world=2), 4) for rank in (0, 1)]
    assert Counter(ids([*parts[0], *parts[1]])) == Counter(all_ids())
    by_id = {
        id_: pixels
        for batch in parts[0]
        for id_, pixels in zip(batch.ids_B.tolist(), batch.pictures_BCHW, strict=True)
    }
    for row in range(4 * ROWS):
        id_ = all_ids()[row]
        if id_ in by_id:
            content = picture(100 * (row // ROWS) + row % ROWS)
            expected = decode_square(content, SIDE_PX, name="").transpose(2, 0, 1) / 127.5 - 1
            np.testing.assert_allclose(by_id[id_].numpy(), expected, rtol=0, atol=1e-6)


def test_the_order_is_that_of_the_seed_and_of_the_images_seen(folder):
    first = ids(take(batches(folder), 16))
    assert ids(take(batches(folder), 16)) == first
    assert first[:32] != first[32:]
    assert Counter(first) == Counter(all_ids() * 2)
    assert ids(take(batches(folder, seed=2), 16)) != first
    assert ids(take(batches(folder, images_seen=64), 16)) != first


def test_visits_are_the_epochs_that_the_images_seen_make(folder):
    visits = [b.visits_B.tolist() for b in take(batches(folder, images_seen=24), 5)]
    assert visits == [[0] * 4] * 2 + [[1] * 4] * 3


def test_a_resume_is_said_to_be_approximate_once(folder, caplog):
    take(batches(folder), 3)
    assert [r.message for r in caplog.records if "approximate" in r.message] == [
        "the tars have no index: resuming is approximate (some pictures come again before others "
        "were seen at all), and so are epochs. `kiln index` makes them exact."
    ]


def test_broken_tars_and_pictures_are_passed_over_until_they_are_too_many(folder, caplog):
    cut = folder / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    (folder / "00002.tar").write_bytes(b"no tar" * 1000)
    bodies = [b"bad"] * 2 + [picture(row) for row in range(2, ROWS)]
    img2dataset_tar(folder / "00003.tar", 3, ROWS, body=bodies.__getitem__)
    good = take(batches(folder), 3)
    assert set(ids(good)) <= set(all_ids())
    assert "does not decode" in caplog.text
    with pytest.raises(BadInput, match=r"are broken, the last: .* at most 1.0%.*max_bad_frac"):
        take(batches(folder), 1000)


def test_tars_that_are_not_there_are_passed_over(folder, caplog):
    stream = batches(folder, f"{folder}/00000.tar", f"{folder}/00009.tar")
    assert len(take(stream, 6)) == 6
    assert "00009.tar is not there" in caplog.text


def test_data_runs_no_command_and_is_never_unpickled(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    trap = pickle.dumps(Trap())
    members = [("a.jpg", picture(0)), ("a.pyd", trap), ("a.pickle", trap), ("a.pth", trap)]
    write_tar(tmp_path / "trap" / "0.tar", members)
    (got,) = take(batches(tmp_path / "trap", micro_batch_images=1), 1)
    assert got.ids_B.tolist() == key_ids(["a"]).tolist()
    with pytest.raises(BadInput, match="is a command for a shell"):
        next(batches(folder, f"pipe:touch {tmp_path}/run"))
    with pytest.raises(BadInput, match="no picture that can be read"):
        next(batches(folder, f"x|touch {tmp_path}/run"))
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_tars_are_refused(folder):
    with pytest.raises(BadInput, match=r"4 tars for 5 ranks.*kiln index"):
        next(batches(folder, world=5))


def test_tars_without_pictures_are_refused(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.txt", b"text")])
    with pytest.raises(BadInput, match=r"0.tar and the 0 other tars of this rank have no picture"):
        next(batches(tmp_path))


def test_a_missing_webdataset_is_named_by_its_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(BadInput, match=r"pip install -e '.\[foreign\]'"):
        next(batches(folder))
