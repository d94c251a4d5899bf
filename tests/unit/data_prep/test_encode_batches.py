"""Laws of packing, of full batches and of running ahead."""

import threading
import time
from collections import Counter
from itertools import count, islice

import numpy as np
import pytest
import torch

from data_prep.buckets import Box
from data_prep.encode_batches import (
    MAX_WAIT_IMAGES,
    Busy,
    Encoders,
    Packer,
    encode_samples,
)
from data_prep.encode_loader import Loaded, run_ahead
from trainer.errors import BadInput

WIDE, SQUARE = Box(4, 2), Box(2, 2)


class Mean:
    """An autoencoder whose latent is the picture's mean; notes the shapes that it is given."""

    latent_channels, downscale = 1, 1

    def __init__(self):
        self.shapes = []

    def moments(self, pictures_BCHW):
        self.shapes.append(tuple(pictures_BCHW.shape))
        mean = pictures_BCHW.mean((1, 2, 3), keepdim=True)
        return mean, torch.zeros_like(mean)

    def decode(self, latents_BCHW):
        raise NotImplementedError

    def to(self, _device):
        return self


class Letters:
    """A text encoder whose tokens are letters and whose states are the tokens."""

    width, max_tokens = 1, 9

    def __init__(self):
        self.shapes = []

    def tokens(self, captions):
        return [[ord(letter) for letter in caption] for caption in captions]

    def states(self, ids_BL):
        self.shapes.append(tuple(ids_BL.shape))
        return ids_BL[..., None].float()


def encoders(**changes):
    given = {
        "autoencoder": Mean(),
        "text": Letters(),
        "boxes": (SQUARE,),
        "batch_images": 8,
        "batch_tokens": 12,
        "device": torch.device("cpu"),
        "threads": 2,
    }
    return Encoders(**given | changes)


def loaded(number, box=SQUARE, caption="abc"):
    picture = np.full((box.height, box.width, 3), number % 256, np.uint8)
    return Loaded(f"{number:016x}", picture, caption, {"bucket": str(box)})


def chunks_of(samples, size=5):
    samples = iter(samples)
    while chunk := list(islice(samples, size)):
        yield chunk


def test_a_packer_loses_nothing_and_mixes_no_shapes():
    dice = np.random.default_rng(0)
    packer = Packer(lambda shape: shape + 1)
    given, found = Counter(), Counter()
    for now, shape in enumerate(dice.integers(0, 4, 200).tolist()):
        given[shape] += 1
        if batch := packer.add(shape, shape, now=now):
            assert batch[1] == [batch[0]] * (batch[0] + 1)
            found[batch[0]] += len(batch[1])
    for shape, items in packer.flush(before=float("inf")):
        assert set(items) == {shape}
        found[shape] += len(items)
    assert found == given


def test_a_packer_flushes_what_is_older():
    packer = Packer(lambda _: 10)
    packer.add("old", 1, now=3)
    packer.add("new", 2, now=5)
    packer.add("old", 3, now=7)
    assert list(packer.flush(before=5)) == [("old", [1, 3])]
    assert list(packer.flush(before=6)) == [("new", [2])]


@pytest.mark.parametrize("threads", [1, 3])
def test_every_batch_is_full_and_every_sample_comes_out_in_order(threads):
    dice = np.random.default_rng(threads)
    samples = [
        loaded(n, (SQUARE, WIDE)[dice.integers(2)], "abcdefgh"[: dice.integers(1, 9)])
        for n in range(100)
    ]
    models, busy = encoders(threads=threads), Busy()
    found = list(encode_samples(chunks_of(samples), models, busy))
    assert [e.key for e in found] == [s.key for s in samples]
    for sample, encoded in zip(samples, found, strict=True):
        assert encoded.moments_2CHW[0] == np.float16(sample.rgb_HWC[0, 0, 0] / 127.5 - 1)
        assert encoded.columns == sample.columns
        assert encoded.text.endswith(
            np.array([[ord(letter)] for letter in sample.caption], np.float16).tobytes()
        )
    shapes = Counter(models.autoencoder.shapes)
    num_wide = sum(s.rgb_HWC.shape[1] == 4 for s in samples)
    assert shapes == {(8, 3, 2, 4): -(-num_wide // 8), (8, 3, 2, 2): -(-(100 - num_wide) // 8)}
    assert set(models.text.shapes) == {(12 // n, n) for n in range(1, 9)}
    assert busy.items == {"images": 100, "captions": len({s.caption for s in samples})}


def test_equal_captions_are_encoded_once():
    models = encoders()
    list(encode_samples(chunks_of(loaded(n) for n in range(50)), models, Busy()))
    assert models.text.shapes == [(4, 3)]


def test_a_rare_shape_does_not_hold_up_the_others_for_ever():
    """Without end: a lone wide picture, then squares."""
    taken = count()
    samples = (loaded(n, SQUARE if n else WIDE) for n in taken)
    found = encode_samples(chunks_of(samples), encoders(), Busy())
    assert next(found).key == f"{0:016x}"
    assert next(taken) < MAX_WAIT_IMAGES + 1000
    found.close()


def test_what_is_not_finite_is_named_after_what_came_before_it():
    class Broken(Mean):
        def moments(self, pictures_BCHW):
            mean, logvar = super().moments(pictures_BCHW)
            return torch.where(mean > 0, torch.inf, mean), logvar

    models = encoders(autoencoder=Broken(), batch_images=2)
    found = encode_samples(chunks_of(loaded(n) for n in (1, 2, 3, 4, 200, 5)), models, Busy())
    assert [e.key for e in islice(found, 4)] == [f"{n:016x}" for n in (1, 2, 3, 4)]
    with pytest.raises(BadInput, match=f"not finite for {200:016x}"):
        next(found)


def test_large_latents_are_clamped_to_fp16():
    class Large(Mean):
        def moments(self, pictures_BCHW):
            mean, logvar = super().moments(pictures_BCHW)
            return mean + 1e6, logvar

    (found,) = encode_samples([[loaded(0)]], encoders(autoencoder=Large()), Busy())
    assert found.moments_2CHW[0] == 65504


def test_an_error_while_reading_comes_out():
    def chunks():
        yield [loaded(0)]
        raise BadInput("cut")

    with pytest.raises(BadInput, match="cut"):
        list(encode_samples(chunks(), encoders(), Busy()))


def test_busy_counts_the_time_inside():
    busy = Busy()
    with busy.span("images", 3):
        time.sleep(0.05)
    assert 0.05 <= busy.seconds["images"] < 0.5
    assert busy.frac(threads=2, wall_s=1.0) == busy.seconds["images"] / 2


def test_running_ahead_keeps_the_order_and_its_distance():
    drawn = []

    def items():
        for number in range(100):
            drawn.append(number)
            yield number

    ahead = run_ahead(items(), 7)
    for number in range(100):
        assert next(ahead) == number
        assert len(drawn) <= number + 1 + 7 + 1
    assert next(ahead, None) is None


def test_running_ahead_works_while_nobody_takes():
    passed = threading.Event()

    def items():
        yield 1
        yield 2
        passed.set()
        yield 3

    ahead = run_ahead(items(), 3)
    assert next(ahead) == 1
    assert passed.wait(10)
    ahead.close()


def test_running_ahead_gives_errors_in_their_place_and_closes_its_source():
    closed = []

    def items():
        try:
            yield 1
            raise BadInput("two")
        finally:
            closed.append(True)

    ahead = run_ahead(items(), 5)
    assert next(ahead) == 1
    with pytest.raises(BadInput, match="two"):
        next(ahead)
    assert closed == [True]
