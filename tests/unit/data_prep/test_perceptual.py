import time
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep.perceptual import phash

PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "photos"


def cloudy(seed, side=256):
    """A picture like a photo: noise at all scales, the large ones strongest."""
    dice = np.random.default_rng(seed)
    pixels = np.zeros((side, side, 3), np.float32)
    for cells in (4, 8, 16, 32, 64):
        noise = dice.normal(0, 1 / cells, (cells, cells, 3)).astype(np.float32)
        pixels += cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)
    return cv2.normalize(pixels, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def pictures():
    painted = [cloudy(seed) for seed in range(20)]
    photos = [cv2.imread(str(path))[:, :, ::-1] for path in sorted(PHOTOS.rglob("*.jpg"))[:40]]
    return painted + [np.ascontiguousarray(photo) for photo in photos]


def distance(first, second):
    return (phash(first) ^ phash(second)).bit_count()


def changed(rgb, kind):
    height, width = rgb.shape[:2]
    if kind == "smaller":
        return cv2.resize(rgb, (width * 2 // 3, height * 2 // 3), interpolation=cv2.INTER_AREA)
    if kind == "larger":
        return cv2.resize(rgb, (width * 2, height * 2), interpolation=cv2.INTER_LANCZOS4)
    if kind == "brighter":
        return cv2.convertScaleAbs(rgb, alpha=0.9, beta=20)
    return cv2.imdecode(cv2.imencode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, 50])[1], 1)


@pytest.mark.parametrize("kind", ["smaller", "larger", "brighter", "recompressed"])
def test_a_version_of_a_picture_differs_in_few_bits(kind):
    distances = [distance(rgb, changed(rgb, kind)) for rgb in pictures()]
    assert np.mean(distances) < 3
    assert max(distances) <= 10


def test_pictures_that_differ_are_half_of_the_bits_apart():
    hashes = [phash(cloudy(seed)) for seed in range(60)]
    distances = [(a ^ b).bit_count() for a, b in combinations(hashes, 2)]
    assert min(distances) > 10
    assert 29 < np.mean(distances) < 34


def test_half_of_the_frequencies_are_above_their_median():
    for rgb in pictures():
        value = phash(rgb)
        assert 0 <= value < 2**64
        assert (value & (2**63 - 1)).bit_count() == 31  # 63 frequencies; the median is not above


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (31, 33), (32, 32)])
def test_every_size_has_a_hash(shape):
    pixels = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
    assert phash(pixels) == phash(pixels.copy())


def test_it_costs_little_beside_a_decode():
    rgb = cloudy(0)
    taken_s = []
    for _ in range(200):
        started_s = time.perf_counter()
        phash(rgb)
        taken_s.append(time.perf_counter() - started_s)
    assert min(taken_s) < 150e-6
