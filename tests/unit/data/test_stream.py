from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.latents_without_encoders import CHANNELS, SIDE, TEXT_WIDTH, make_dataset
from trainer.data.manifest import list_encodings, load_manifest
from trainer.data.sources import LatentSource, PictureSource, pad_texts
from trainer.data.stream import micro_batches
from trainer.errors import BadInput


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def latents(dataset):
    with closing(LatentSource(dataset, list_encodings(dataset)[0])) as source:
        yield source


def ids_by_step(source, *, steps, images_seen, world, micro, global_batch, prefetch=2):
    """The set of (id, visit) of each global step, put together from all ranks."""
    out = [set() for _ in range(steps)]
    per_rank = global_batch // world // micro
    for rank in range(world):
        batches = micro_batches(
            source,
            images_seen=images_seen,
            seed=11,
            rank=rank,
            world=world,
            global_batch_images=global_batch,
            micro_batch_images=micro,
            prefetch_batches=prefetch,
        )
        for number, batch in enumerate(islice(batches, steps * per_rank)):
            seen = zip(batch.ids_B.tolist(), batch.visits_B.tolist(), strict=True)
            out[number // per_rank].update(seen)
        batches.close()
    return out


@given(
    world=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2]),
    done=st.integers(0, 6),
    prefetch=st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_a_step_is_the_same_set_for_any_ranks_micro_batch_prefetch_and_restart(
    latents, world, micro, done, prefetch
):
    expected = ids_by_step(latents, steps=8, images_seen=0, world=1, micro=8, global_batch=8)
    got = ids_by_step(
        latents,
        steps=8 - done,
        images_seen=8 * done,
        world=world,
        micro=micro,
        global_batch=8,
        prefetch=prefetch,
    )
    assert got == expected[done:]
    assert all(len(step) == 8 for step in got)


def test_every_sample_comes_once_an_epoch_whatever_the_batch(latents):
    size = latents.num_samples
    assert size == 20
    for batch in (1, 2, 4, 8, 6):
        steps = -(-2 * size // batch)
        seen = set().union(
            *ids_by_step(latents, steps=steps, images_seen=0, world=1, micro=1, global_batch=batch)
        )
        first_epochs = [(who, visit) for who, visit in seen if visit < 2]
        assert len(first_epochs) == 2 * size
        assert len({who for who, _ in first_epochs}) == size


def test_latents_and_texts_are_what_was_stored(latents):
    batch = latents.load(np.array([0, 19, 7]), np.zeros(3, np.int64))
    assert batch.mean_BCHW.shape == batch.logvar_BCHW.shape == (3, CHANNELS, SIDE, SIDE)
    assert batch.mean_BCHW.dtype == torch.float32
    assert batch.text_BLD.shape[2] == TEXT_WIDTH
    assert batch.text_mask_BL.shape == batch.text_BLD.shape[:2]
    assert (batch.text_BLD[~batch.text_mask_BL] == 0).all()
    alone = latents.load(np.array([19]), np.zeros(1, np.int64))
    assert torch.equal(alone.mean_BCHW[0], batch.mean_BCHW[1])
    assert alone.ids_B[0] == batch.ids_B[1]


def test_pictures_are_square_and_in_range(dataset):
    with closing(PictureSource(dataset, load_manifest(dataset), side_px=32)) as source:
        batch = source.load(np.arange(3), np.zeros(3, np.int64))
    assert batch.pictures_BCHW.shape == (3, 3, 32, 32)
    assert -1 <= batch.pictures_BCHW.min() < batch.pictures_BCHW.max() <= 1


def test_latents_and_pictures_of_a_number_are_the_same_sample(dataset, latents):
    numbers, visits = np.arange(20), np.zeros(20, np.int64)
    with closing(PictureSource(dataset, load_manifest(dataset), side_px=32)) as pictures:
        ids_B = pictures.load(numbers, visits).ids_B
    assert torch.equal(ids_B, latents.load(numbers, visits).ids_B)


def test_padding_keeps_every_token():
    texts = [torch.randn(length, 3) for length in (2, 5, 1)]
    text_BLD, mask_BL = pad_texts(texts)
    assert mask_BL.sum(1).tolist() == [2, 5, 1]
    for row, text in enumerate(texts):
        assert torch.equal(text_BLD[row, : len(text)], text)


def test_a_tar_cut_in_half_is_named_and_the_stream_ends(tmp_path):
    dataset = make_dataset(tmp_path)
    tar = dataset / "encodings/tiny/00001.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with pytest.raises(BadInput, match=r"00001\.tar does not match the manifest"):
        LatentSource(dataset, list_encodings(dataset)[0])
