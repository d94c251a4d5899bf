from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.latents_without_encoders import CHANNELS, TEXT_WIDTH, make_dataset
from tests.streams import latents, load
from tests.tiny import tiny_config
from trainer.build import build_loss, build_parameterization, training_times
from trainer.config_first_stage import ReconstructionConfig
from trainer.data.sources import PictureBatch
from trainer.objectives import LatentObjective, ReconstructionObjective, crops

FLOW = tiny_config().objective


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    dataset = make_dataset(tmp_path_factory.mktemp("objective"))
    with latents(dataset) as source:
        yield source


def objective(dropout: float, seed: int = 1) -> LatentObjective:
    return LatentObjective(
        build_loss(FLOW),
        training_times(FLOW.times, build_parameterization(FLOW).process),
        seed=seed,
        latent_mean_C=torch.zeros(CHANNELS),
        latent_std_C=torch.ones(CHANNELS),
        null_text_LD=torch.full((2, TEXT_WIDTH), 7.0),
        caption_dropout=dropout,
    )


class Recorder(torch.nn.Module):
    """Predicts zero and remembers what it was asked."""

    def forward(self, x_t, time_B, text_BLD, mask_BL):
        self.asked = (x_t, time_B, text_BLD, mask_BL)
        return torch.zeros_like(x_t)


def test_draws_belong_to_the_sample_not_to_its_place_in_a_batch(source):
    whole = objective(0.5)(Recorder(), load(source, np.arange(20)))
    parts = [objective(0.5)(Recorder(), load(source, [n])) for n in range(20)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-6, atol=0)


def test_another_visit_or_seed_draws_anew(source):
    batch = load(source, np.arange(8))
    revisited = replace(batch, visits_B=batch.visits_B + 1)
    first = objective(0.0)(Recorder(), batch)
    again = objective(0.0)(Recorder(), revisited)
    seeded = objective(0.0, seed=2)(Recorder(), batch)
    assert (first != again).all()
    assert (first != seeded).all()


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.0), (1.0, 1.0), (0.3, 0.3)])
def test_dropped_captions_become_the_empty_one_with_its_own_length(source, dropout, share):
    model = Recorder()
    objective(dropout)(model, load(source, np.arange(50 * 20)))
    _, _, text_BLD, mask_BL = model.asked
    dropped_B = (text_BLD[:, 0] == 7.0).all(1)
    assert dropped_B.float().mean() == pytest.approx(share, abs=0.05)
    assert (mask_BL[dropped_B].sum(1) == 2).all()
    assert (text_BLD[dropped_B, 2:] == 0).all()


def test_a_weight_multiplies_the_loss_of_its_sample_alone(source):
    batch = load(source, np.arange(8))
    assert batch.weights_B is None
    plain = objective(0.0)(Recorder(), batch)
    weights_B = torch.linspace(0.1, 1, 8)
    weighted = objective(0.0)(Recorder(), replace(batch, weights_B=weights_B))
    assert torch.equal(weighted, weights_B * plain)


def test_crops_lie_inside_and_reach_every_corner():
    picture = torch.arange(64.0).view(1, 1, 8, 8).expand(1000, 3, 8, 8)
    squares = crops(picture, torch.rand(1000, 2), 5)
    assert squares.shape == (1000, 3, 5, 5)
    assert set(squares[:, 0, 0, 0].int().tolist()) == {
        8 * top + left for top in range(4) for left in range(4)
    }
    assert torch.equal(
        crops(picture[:1], torch.tensor([[0.9999999, 0.9999999]]), 5)[0, 0], picture[0, 0, 3:, 3:]
    )


@pytest.mark.parametrize("whole_frac", [0.0, 0.4, 1.0])
def test_an_autoencoder_learns_each_picture_whole_or_by_a_crop_of_its_own(whole_frac):
    sides = []

    class Echo(torch.nn.Module):
        def forward(self, pictures, noise, _is_judging):
            sides.extend([pictures.shape[-1]] * len(pictures))
            assert noise.shape == (
                len(pictures),
                4,
                pictures.shape[-1] // 4,
                pictures.shape[-1] // 4,
            )
            return pictures + 1, noise * 0, noise * 0

    objective = ReconstructionObjective(
        ReconstructionConfig(
            kind="reconstruction",
            absolute_weight=0.0,
            kl_weight=1.0,
            crop_side_px=8,
            whole_frac=whole_frac,
        ),
        seed=0,
        latent_channels=4,
        pixels_per_latent=4,
    )
    batch = PictureBatch(torch.arange(200), torch.zeros(200).long(), torch.rand(200, 3, 16, 16))
    torch.testing.assert_close(objective(Echo(), batch), torch.ones(200))
    assert len(sides) == 200
    assert sides.count(16) / 200 == pytest.approx(whole_frac, abs=0.1)
