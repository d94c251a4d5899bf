"""Laws of drawing from a picture: img2img and inpainting."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.trainer.test_sample import CAPTIONS, config, load
from trainer import sample as command
from trainer.drawing import Known
from trainer.errors import BadInput
from trainer.painting import read_known

SOLVERS = ["ddpm", "ddim", "euler", "heun", "dpm_2m", "dpm_sde", "unipc", "dopri5"]
ASKED = [[(caption, number) for number, caption in enumerate(CAPTIONS)]]


@pytest.fixture
def init(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    path = tmp_path / "init.png"
    Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC).save(path)
    return path


def mask_file(tmp_path, values, size=(32, 32)):
    path = tmp_path / "mask.png"
    Image.fromarray(np.broadcast_to(np.asarray(values, np.uint8), size)).save(path)
    return path


def draw(sampler, known, *, strength=1.0, **changes):
    sampling = replace(config("x").sampling, first_time=strength, **changes)
    (pixels,) = sampler.draw(ASKED, sampling, known=known)
    return pixels


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_black_mask_returns_the_inputs_reconstruction_exactly(tiny_run, tmp_path, init, solver):
    sampler = load(tiny_run)
    known = read_known(sampler, init, mask_file(tmp_path, 0))
    kept = sampler.decode(known.latents_CHW[None])
    for strength in (0.6, 1.0):
        drawn = draw(sampler, known, strength=strength, solver=solver)
        assert (drawn == kept).all()
    with Image.open(init) as picture:
        rebuilt = sampler.reconstruct(np.array(picture)[None])
    assert np.abs(kept.astype(int) - rebuilt).max() <= 1


@pytest.mark.parametrize("solver", ["heun", "dpm_2m"])
def test_a_white_mask_equals_no_mask(tiny_run, tmp_path, init, solver):
    sampler = load(tiny_run)
    whole = read_known(sampler, init, None)
    masked = read_known(sampler, init, mask_file(tmp_path, 255))
    assert (draw(sampler, whole, solver=solver) == draw(sampler, masked, solver=solver)).all()


def test_little_strength_returns_nearly_the_reconstruction_and_much_does_not(tiny_run, init):
    sampler = load(tiny_run)
    known = read_known(sampler, init, None)
    kept = sampler.decode(known.latents_CHW[None]).astype(int)
    off = [np.abs(draw(sampler, known, strength=s) - kept).mean() for s in (0.001, 0.3, 1.0)]
    assert off[0] < 1
    assert off[0] < off[1] < off[2]


def test_full_strength_without_a_mask_draws_from_noise_alone(tiny_run, init):
    sampler = load(tiny_run)
    assert (draw(sampler, read_known(sampler, init, None)) == draw(sampler, None)).all()


def test_a_mask_counts_by_its_area_in_a_latent(tiny_run, tmp_path, init):
    sampler = load(tiny_run)
    columns = np.zeros((32, 32), np.uint8)
    columns[:, :9] = 255  # half of the fifth column of latents, which are 2 px wide
    mask_HW = read_known(sampler, init, mask_file(tmp_path, columns)).mask_HW
    assert mask_HW.shape == (16, 16)
    torch.testing.assert_close(mask_HW[3], torch.tensor([1.0] * 4 + [0.5] + [0.0] * 11))


def test_a_half_masked_latent_keeps_the_other_half(tiny_run, init):
    sampler = load(tiny_run)
    latents = read_known(sampler, init, None).latents_CHW
    mask_HW = torch.zeros(16, 16)
    mask_HW[:, 8:] = 1
    sampler = replace(sampler, autoencoder=Transparent())
    known = Known(latents.clamp(-0.9, 0.9), mask_HW)
    drawn = draw(sampler, known)
    kept = sampler.decode(known.latents_CHW[None])
    assert (drawn[:, :, :8] == kept[:, :, :8]).all()
    assert (drawn[:, :, 8:] != kept[:, :, 8:]).mean() > 0.5


class Transparent:
    """Shows latents as they are."""

    def decode(self, latents_BCHW):
        return latents_BCHW[:, :3]


def test_the_command_repaints_and_says_so(tiny_run, tmp_path, init):
    mask = mask_file(tmp_path, 0)
    words = ["prompts=[a ring]", f"init={init}", f"mask={mask}", f"out={tmp_path / 'o'}"]
    assert command.run(config(tiny_run, *words)) == 0
    with Image.open(tmp_path / "o" / "sample_0000.png") as picture:
        assert "compositeWithTrainedAlgorithmicMedia" in picture.text["digital_source_type"]
        assert len(picture.text["init_sha256"]) == len(picture.text["mask_sha256"]) == 64
        drawn = np.asarray(picture)
    sampler = load(tiny_run)
    assert (drawn == sampler.decode(read_known(sampler, init, mask).latents_CHW[None])).all()


def test_pictures_that_cannot_be_used_are_refused(tiny_run, tmp_path, init):
    sampler = load(tiny_run)
    with pytest.raises(BadInput, match=r"init=.*missing\.png cannot be read"):
        read_known(sampler, tmp_path / "missing.png", None)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(BadInput, match=r"mask=.*text\.png cannot be read"):
        read_known(sampler, init, tmp_path / "text.png")
    with pytest.raises(BadInput, match=r"has 16x32 px, but .* has 32x32"):
        read_known(sampler, init, mask_file(tmp_path, 0, size=(32, 16)))


def test_a_mask_without_a_picture_and_two_starts_are_refused(tiny_run):
    with pytest.raises(BadInput, match="Give init=PICTURE"):
        config(tiny_run, "mask=x.png")
    with pytest.raises(BadInput, match="drawing starts at strength="):
        config(tiny_run, "init=x.png", "sampling.first_time=0.5")
