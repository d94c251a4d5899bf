import io
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.latents_without_encoders import CHANNELS, SIDE, TEXT_WIDTH, make_dataset
from tests.streams import ids, latents, load, pictures, size
from tests.tiny_dataset import scenes_dataset
from tests.unit.data.test_tombstones import remove
from trainer.data import reader as reader_module
from trainer.data.cache import Cache
from trainer.data.loader import Pace, micro_batches
from trainer.data.manifest import list_encodings, load_manifest
from trainer.data.npy import read_npy
from trainer.data.opening import Dataset, Layout, make_law, open_readers
from trainer.data.quarantine import Quarantine
from trainer.data.sources import LatentSource, Samples
from trainer.data.stream import begin, step_slots
from trainer.errors import BadInput
from trainer.observe.jsonl import read_rows
from trainer.place import place, put_bytes


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path, shard_counts=(7, 5, 8))


def tars(dataset):
    return sorted((dataset / "encodings/tiny").glob("*.tar"))


def stored(dataset):
    """Key number -> (moments, text) of all samples, read with nothing of Kiln's."""
    found = {}
    for path in tars(dataset):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                array = np.load(io.BytesIO(tar.extractfile(member).read()))
                found.setdefault(int(key, 16), {})[extension] = array
    return found


def spoil(path, name, *, at=0, content=b"\xff" * 64):
    """Overwrite bytes of one member of a tar."""
    with tarfile.open(path) as tar:
        member = next(m for m in tar if m.name.endswith(name))
    with path.open("r+b") as file:
        file.seek(member.offset_data + at)
        file.write(content)
    return int(member.name.partition(".")[0], 16)


def everything(source, **options):
    return ids(load(source, np.arange(size(source)), **options))


def test_latents_and_texts_are_what_was_stored_in_whatever_batch(dataset):
    expected = stored(dataset)
    with latents(dataset) as source:
        batches = [load(source, [3]), load(source, np.arange(20)), load(source, [5, 3])]
        for batch in batches:
            assert batch.mean_BCHW.shape[1:] == (CHANNELS, SIDE, SIDE)
            assert batch.text_BLD.shape[2] == TEXT_WIDTH
            assert batch.mean_BCHW.dtype == batch.text_BLD.dtype == torch.float32
            for row, key in enumerate(ids(batch)):
                mean, logvar = expected[key]["latent.npy"]
                text, length = expected[key]["text.npy"], int(batch.text_mask_BL[row].sum())
                assert np.array_equal(batch.mean_BCHW[row], mean.astype(np.float32))
                assert np.array_equal(batch.logvar_BCHW[row], logvar.astype(np.float32))
                assert np.array_equal(batch.text_BLD[row, :length], text.astype(np.float32))
                assert not batch.text_BLD[row, length:].any()
    assert set(ids(batches[1])) == expected.keys()
    assert ids(batches[0])[0] == ids(batches[2])[1]


def test_pictures_are_square_and_in_range_and_the_same_samples_as_the_latents(dataset):
    with pictures(dataset, side_px=32) as some, latents(dataset) as others:
        batch = load(some, np.arange(20), epoch=1)
        assert ids(batch) == everything(others, epoch=1)
    assert batch.pictures_BCHW.shape == (20, 3, 32, 32)
    assert -1 <= batch.pictures_BCHW.min() < batch.pictures_BCHW.max() <= 1
    assert batch.visits_B.tolist() == [1] * 20


@pytest.mark.parametrize(
    ("extension", "at", "why"),
    [("latent.npy", 0, "is no array"), ("text.npy", 0, "is no array")],
)
def test_a_bad_sample_is_replaced_and_all_others_keep_their_places(
    dataset, tmp_path, extension, at, why
):
    with latents(dataset) as source:
        before = everything(source)
    dead = spoil(tars(dataset)[1], extension, at=at)
    log = tmp_path / "run/rank.jsonl"
    with latents(dataset, log=log) as source:
        after = everything(source)
        one_by_one = [ids(load(source, [position]))[0] for position in range(20)]
    assert one_by_one == after
    assert dead not in after
    assert [new for old, new in zip(before, after, strict=True) if old != dead] == [
        old for old in before if old != dead
    ]
    (record,) = read_rows(log)
    assert (record["key"], record["shard"]) == (f"{dead:016x}", str(tars(dataset)[1]))
    assert why in record["why"]


def test_an_array_of_another_shape_is_a_bad_sample(dataset, tmp_path):
    header = np.lib.format.header_data_from_array_1_0(np.zeros((2, 4, 8, 2), np.float16))
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, header)
    with latents(dataset, log=tmp_path / "log") as source:
        everything(source)  # now the shape is known
        dead = spoil(tars(dataset)[0], "latent.npy", content=content.getvalue())
        assert dead not in everything(source)
    assert "needs float16 (2, 4, 4, 4)" in read_rows(tmp_path / "log")[0]["why"]


def test_a_cut_tar_and_a_vanished_shard_lose_only_their_own_samples(dataset, tmp_path):
    with latents(dataset) as source:
        before = everything(source)
    last, middle = tars(dataset)[2], tars(dataset)[1]
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    middle.unlink()
    with latents(dataset, log=tmp_path / "log", max_bad_frac=0.9) as source:
        after = everything(source)
    lost = set(before) - set(after)
    kept = [(old, new) for old, new in zip(before, after, strict=True) if old not in lost]
    assert all(old == new for old, new in kept)
    assert 5 < len(lost) < 5 + 8
    assert len(set(after)) <= 20 - len(lost)


def test_a_dataset_that_is_mostly_bad_stops_the_run(dataset, tmp_path):
    for path in tars(dataset)[:2]:
        path.unlink()
    with (
        latents(dataset, log=tmp_path / "log", max_bad_frac=0.1) as source,
        pytest.raises(BadInput, match=r"data\.max_bad_frac=0\.1 .*is not there"),
    ):
        everything(source)


def test_what_was_removed_later_keeps_its_place_and_is_never_given_out(dataset, tmp_path):
    with latents(dataset) as source:
        before = everything(source)
    remove(dataset, before[3:6])
    log = tmp_path / "log"
    with latents(dataset, version=0, log=log) as source:
        after = everything(source)
        assert size(source) == 20
    assert not set(after) & set(before[3:6])
    assert after[:3] + after[6:] == before[:3] + before[6:]
    assert not log.exists()
    with latents(dataset) as source:
        assert sorted(everything(source)) == sorted(set(before) - set(before[3:6]))


def test_a_removal_takes_effect_in_a_run_that_is_going_on(dataset, monkeypatch):
    with latents(dataset) as source:
        before = everything(source)
        remove(dataset, before[:2])
        monkeypatch.setattr(reader_module, "RELOAD_S", 0.0)
        assert not set(everything(source)) & set(before[:2])


def test_shards_that_were_changed_while_they_are_read_are_refused(dataset, monkeypatch):
    with latents(dataset) as source:
        everything(source)
        make_dataset(dataset.parent, shard_counts=(5, 7, 8))
        monkeypatch.setattr(reader_module, "RELOAD_S", 0.0)
        with pytest.raises(BadInput, match="were changed while they were being read"):
            everything(source)


def test_when_nothing_is_left_to_replace_a_sample_the_run_stops(dataset):
    with latents(dataset) as source:
        before = everything(source)
    remove(dataset, before)
    with (
        latents(dataset, version=0) as source,
        pytest.raises(BadInput, match="nothing is left in this window"),
    ):
        load(source, [0])


def test_a_storage_is_read_as_a_local_folder_is_with_and_without_a_cache(dataset, tmp_path):
    remote = place("memory://sources")
    for path in dataset.rglob("*"):
        if path.is_file():
            put_bytes(remote / str(path.relative_to(dataset)), path.read_bytes())
    cache = Cache(tmp_path / "cache", max_bytes=10**9)
    with latents(dataset) as local, latents(remote) as ranges, latents(remote, cache=cache) as kept:
        expected = load(local, np.arange(20))
        for source in (ranges, kept):
            got = load(source, np.arange(20))
            assert ids(got) == ids(expected)
            assert torch.equal(got.mean_BCHW, expected.mean_BCHW)
            assert torch.equal(got.text_BLD, expected.text_BLD)
    assert cache.stats.misses == 3 + 3  # tars and their indexes


def test_a_shard_of_another_hash_never_gets_into_the_cache_nor_into_a_batch(dataset, tmp_path):
    cache = Cache(tmp_path / "cache", max_bytes=10**9)
    lost = spoil(tars(dataset)[1], "latent.npy", at=200)
    with latents(dataset, cache=cache, log=tmp_path / "log", max_bad_frac=0.9) as source:
        after = everything(source)
    assert lost not in after
    rows = read_rows(tmp_path / "log")
    assert {row["shard"] for row in rows} == {str(tars(dataset)[1])}
    assert all("sha256" in row["why"] for row in rows)
    assert cache.stats.misses == len(list((tmp_path / "cache").glob("*-*"))) == 2 + 3


def mixed(datasets, **options):
    found = [Dataset(path, load_manifest(path), list_encodings(path)[0]) for path in datasets]
    law = make_law(found, Layout(seed=3))
    return LatentSource(
        Samples(law, open_readers(found, law, **options), Quarantine(None, max_bad_frac=0))
    )


def test_two_datasets_with_equal_names_of_shards_do_not_meet_in_the_cache(tmp_path):
    one = make_dataset(tmp_path / "one", shard_counts=(6, 6))
    two = make_dataset(tmp_path / "two", shard_counts=(7, 7))
    cache = Cache(tmp_path / "cache", max_bytes=10**9)
    plain, kept = mixed([one, two]), mixed([one, two], cache=cache)
    law = plain.samples.law
    slots = step_slots(law, begin(law, [1.0, 1.0]), 24)
    first, second = plain.load(slots), kept.load(slots)
    assert torch.equal(first.mean_BCHW, second.mean_BCHW)
    assert Counter(slots.members.tolist()) == {0: 12, 1: 12}
    assert cache.stats.misses == 4 + 4
    for source in (plain, kept):
        source.samples.close()


def stream_of(source, *, state, steps, world=1, micro=4, threads=1, prefetch=2):
    """Ids of each step, put together from all ranks."""
    out = [[] for _ in range(steps)]
    for rank in range(world):
        pace = Pace(rank, world, 8, micro, threads, prefetch)
        batches = micro_batches(source, state, pace)
        per_rank = 8 // world // micro
        for number, batch in enumerate(islice(batches, steps * per_rank)):
            out[number // per_rank] += zip(ids(batch), batch.visits_B.tolist(), strict=True)
        batches.close()
    return [Counter(step) for step in out]


@given(
    world=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2]),
    threads=st.integers(1, 3),
    prefetch=st.integers(0, 5),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_steps_are_the_same_sets_whatever_reads_them(dataset, world, micro, threads, prefetch):
    with latents(dataset) as source:
        state = begin(source.samples.law, [1.0])
        expected = stream_of(source, state=state, steps=5)
        got = stream_of(
            source,
            state=state,
            steps=5,
            world=world,
            micro=micro,
            threads=threads,
            prefetch=prefetch,
        )
    assert got == expected
    first_epoch = [key for (key, visit) in chain(*expected) if visit == 0]
    assert len(set(first_epoch)) == len(first_epoch) == 20


def test_the_shards_of_the_next_window_are_fetched_before_they_are_needed(tmp_path):
    dataset = make_dataset(tmp_path, shard_counts=(8,) * 8)
    cache = Cache(tmp_path / "cache", max_bytes=10**9)
    with latents(dataset, cache=cache, streams=2, window_shards=1) as source:
        pace = Pace(0, 1, 8, 8, 1, 0)
        batches = micro_batches(source, begin(source.samples.law, [1.0]), pace)
        next(batches)
        order = source.samples.law.orders[0]["32x32"]
        soon = {*order.shards_in((0, 0), np.arange(2)), *order.shards_in((0, 1), np.arange(2))}
        batches.close()  # waits for what is being fetched
    assert cache.stats.misses <= 2 * len(soon) < 2 * 8


def test_more_streams_than_shards_are_refused_with_a_number_that_works(dataset):
    found = Dataset(dataset, load_manifest(dataset), None)
    with pytest.raises(
        BadInput, match=r"data\.canonical_streams=4, .* Give data\.canonical_streams=3"
    ):
        make_law([found], Layout(seed=0, streams=4))
    assert make_law([found], Layout(seed=0, streams=4, mode="ranges")).streams == 4
    assert make_law([found], Layout(seed=0)).streams == 3


def test_a_sample_without_a_picture_is_replaced(tmp_path):
    dataset = scenes_dataset(tmp_path / "d")
    path = sorted((dataset / "shards").glob("*.tar"))[0]
    dead = spoil(path, ".png")
    with pictures(dataset, side_px=16, log=tmp_path / "log") as source:
        assert dead not in everything(source)
    assert "does not decode" in read_rows(tmp_path / "log")[0]["why"]


def test_headers_of_arrays_are_parsed_in_many_threads_at_once():
    contents = []
    for length in range(1, 400):
        file = io.BytesIO()
        np.save(file, np.full((length, 3), length, np.float16))
        contents.append(file.getvalue())
    with ThreadPoolExecutor(16) as threads:
        for length, array in enumerate(threads.map(read_npy, contents * 5)):
            assert np.array_equal(array, np.full((length % 399 + 1, 3), length % 399 + 1))


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x10\x00{'descr': 'O'   }"]
)
def test_what_is_no_array_of_numbers_is_a_value_error(content):
    with pytest.raises(ValueError):  # noqa: PT011 - the words are numpy's
        read_npy(content)
