"""Measured on real pictures: what looks worse to people is farther away."""

from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from data_prep.scenes import held_out_scenes, paint
from trainer.quality.statistics import (
    fit_gaussian,
    frechet_distance,
    kernel_distance,
    precision_and_recall,
)

PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "photos"
SIDE_PX = 64
COUNT = 100


def painted():
    scenes = held_out_scenes(2 * COUNT, seed=0, two_things_frac=0.35)
    pictures = [paint(scene, SIDE_PX, SIDE_PX, jitter_seed=i) for i, scene in enumerate(scenes)]
    return np.stack([np.asarray(picture) for picture in pictures])


def photographs():
    if not PHOTOS.is_dir():
        pytest.skip(f"{PHOTOS} is not there: the photographs are optional")
    # Every second one: the names are sorted by kind of clothes.
    opened = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))[::2]]
    return np.stack([np.asarray(ImageOps.fit(photo, (SIDE_PX, SIDE_PX))) for photo in opened])


def blurred(pictures, sigma_px):
    return np.stack([cv2.GaussianBlur(each, (0, 0), sigma_px) for each in pictures])


def noisy(pictures, deviation_frac):
    draws = np.random.default_rng(0).normal(0, 255 * deviation_frac, pictures.shape)
    return np.clip(pictures + draws, 0, 255).round().astype(np.uint8)


# Beyond these the network tells scenes no better apart: at a noise of 0.4 they come nearer again.
LADDERS = {
    "photographs": (photographs, (1, 2, 4, 8), (0.02, 0.05, 0.1, 0.2, 0.4)),
    "painted scenes": (painted, (1, 2, 4), (0.02, 0.05, 0.1)),
}


@pytest.mark.parametrize("kind", LADDERS)
def test_distances_grow_with_blur_and_with_noise(kind, small_efficientnet):
    load, blurs_px, noises_frac = LADDERS[kind]
    pictures = np.random.default_rng(0).permutation(load())
    real, others = small_efficientnet(pictures[:COUNT]), pictures[COUNT:]
    law = fit_gaussian(real)

    def measured(changed):
        rows = small_efficientnet(changed)
        precise, recalled = precision_and_recall(real, rows)
        distances = frechet_distance(fit_gaussian(rows), law), kernel_distance(rows, real)
        return *distances, precise.mean(), recalled.mean()

    untouched = measured(others)
    for change, steps in ((blurred, blurs_px), (noisy, noises_frac)):
        rungs = [untouched, *(measured(change(others, step)) for step in steps)]
        for before, after in pairwise(rungs):
            assert after[0] > before[0]
            assert after[1] > before[1]
        # Pictures without change are of the same law: KID is near 0, and most are covered.
        assert abs(rungs[0][1]) < 0.1 * rungs[-1][1]
        assert min(rungs[0][2:]) > 0.6
        assert rungs[-1][3] < rungs[0][3]
