"""Laws of the loss at fixed times and noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.tiny import tiny_config
from trainer.build import build_parameterization
from trainer.diffusion.objective import Weight, denoising_loss
from trainer.diffusion.process import like, log_snr
from trainer.diffusion.times import uniform_times
from trainer.fixed_loss import (
    LEVELS,
    Pairs,
    curve,
    errors,
    law_times,
    level_times,
    loss_scores,
    v_errors,
    with_interval,
)
from trainer.models.denoisers import build_denoiser
from trainer.sampler import load_sampler, pad_texts

VP = {"kind": "vp", "betas": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_levels": None,
      "zero_terminal_snr": False}  # fmt: skip
UNIFORM = {"kind": "uniform", "mean": 0.0, "std": 1.0, "shift": 1.0}


@pytest.fixture
def sampler(tiny_run):
    return load_sampler(tiny_run, device="cpu", threads=2)


@pytest.fixture
def pairs(sampler):
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randn((9, *sampler.latent_shape), generator=generator)
    lengths = [2, 5, 3, 7, 2, 4, 6, 3, 5]
    texts = [torch.randn((n, 16), generator=generator) for n in lengths]
    return Pairs(x0, texts, "noise")


def with_objective(sampler, model, process=VP, prediction="eps", **changes):
    """The sampler of a run whose network is `model` and predicts that on that process."""
    keys = {"objective__process": process, "objective__prediction": prediction}
    objective = tiny_config(objective__times=UNIFORM, **keys, **changes).objective
    return replace(
        sampler,
        model=model,
        objective=objective,
        parameterization=build_parameterization(objective),
    )


class Says(nn.Module):
    """A network that answers as a denoiser x0 = f(x_t, t) would, whatever it should predict."""

    def __init__(self, f):
        super().__init__()
        self.f, self.parameterization = f, None

    def forward(self, x, time_B, text_BLD, mask_BL):
        process = self.parameterization.process
        t = like((time_B / 1000.0).double(), x)  # the processes here feed 1000 t
        x0 = self.f(x, t, process)
        alpha, sigma = process.alpha(t).to(x), process.sigma(t).to(x)
        eps = (x - alpha * x0) / sigma
        kinds = {"eps": eps, "x0": x0, "flow": eps - x0, "v": alpha * eps - sigma * x0}
        return kinds[self.parameterization.kind]


def saying(sampler, f, process=VP, prediction="eps", **changes):
    model = Says(f)
    found = with_objective(sampler, model, process, prediction, **changes)
    model.parameterization = found.parameterization
    return found


def half(x, t, process):
    return 0.5 * x


def linear(x, t, process):
    alpha, sigma = process.alpha(t).to(x), process.sigma(t).to(x)
    return alpha / (alpha**2 + sigma**2) * x


def test_no_number_depends_on_batches_or_threads(sampler, pairs):
    one, other = (
        loss_scores(replace(sampler, threads=threads), pairs, 4, batch_images=size)
        for threads, size in ((1, 9), (3, 2))
    )
    for name, score in one["scores"].items():
        for key, value in score.items():
            assert other["scores"][name][key] == pytest.approx(value, rel=1e-4), (name, key)
    for rows in ("loss_by_time", "errors_by_log_snr"):
        for a, b in zip(one[rows], other[rows], strict=True):
            assert b == pytest.approx(a, rel=1e-3)


def test_the_same_again_is_the_same_bit_for_bit(sampler, pairs):
    told = [loss_scores(sampler, pairs, 4, batch_images=4) for _ in range(2)]
    assert told[0] == told[1]


def test_a_pairs_errors_do_not_depend_on_the_other_pairs(sampler, pairs):
    times_K = torch.tensor([0.3, 0.8])
    few = Pairs(pairs.x0_NCHW[:4], pairs.texts[:4], "fewer")
    whole, part = (errors(sampler, each, times_K, batch_images=3) for each in (pairs, few))
    np.testing.assert_allclose(part.loss_NK, whole.loss_NK[:4], rtol=1e-4)


def test_who_knows_the_data_loses_nothing(sampler, pairs):
    same = pairs.x0_NCHW[:1]
    alike = Pairs(same.expand(4, -1, -1, -1).contiguous(), pairs.texts[:4], "one picture")
    knows = saying(sampler, lambda x, t, process: same.to(x).expand_as(x))
    told = loss_scores(knows, alike, 4, batch_images=4)
    for score in told["scores"].values():
        assert score["value"] == pytest.approx(0, abs=1e-6)


def test_knowing_only_the_variance_of_the_data_costs_one_at_every_level(sampler, pairs):
    told = loss_scores(saying(sampler, linear), pairs, 4, batch_images=4)
    v_error = told["scores"]["v_error"]
    assert v_error["value"] == pytest.approx(1, abs=0.05)
    assert v_error["low"] < 1.02
    assert v_error["high"] > 0.98
    for row in told["errors_by_log_snr"]:
        assert row["v_error"] == pytest.approx(1, abs=0.08)
        snr = np.exp(row["log_snr"])
        assert row["x0_error"] * snr == pytest.approx(row["eps_error"], rel=1e-3)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_equal_estimates_have_equal_common_errors_whatever_is_predicted(sampler, pairs, prediction):
    weight = {"kind": "min_snr", "gamma": 5.0, "k": 1.0, "bias": 2.0}
    plain = saying(sampler, half)
    other = saying(sampler, half, prediction=prediction, objective__weight=weight)
    one, two = (loss_scores(each, pairs, 4, batch_images=9) for each in (plain, other))
    assert two["scores"]["v_error"] == pytest.approx(one["scores"]["v_error"], rel=1e-3)
    assert two["scores"]["loss"]["value"] != pytest.approx(one["scores"]["loss"]["value"], rel=0.01)


def test_training_lowers_it(sampler, pairs):
    model = build_denoiser(sampler.cfg.model, seed=2)
    fresh = with_objective(sampler, model)
    before = loss_scores(fresh, pairs, 8, batch_images=9)["scores"]
    optim = torch.optim.Adam(model.parameters(), lr=3e-3)
    text_BLD, mask_BL = pad_texts(pairs.texts)
    torch.manual_seed(0)
    for _ in range(60):
        t_B = uniform_times(fresh.parameterization.process, torch.rand(9))
        loss = denoising_loss(
            fresh.parameterization,
            lambda x, time_B: model(x, time_B, text_BLD, mask_BL),
            pairs.x0_NCHW,
            torch.randn_like(pairs.x0_NCHW),
            t_B,
            weight=Weight(),
        ).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
    after = loss_scores(fresh, pairs, 8, batch_images=9)["scores"]
    assert after["loss"]["high"] < before["loss"]["low"]
    assert after["v_error"]["value"] < before["v_error"]["value"]


def test_times_of_the_law_are_in_the_middle_of_its_parts(sampler):
    found = with_objective(sampler, nn.Identity())
    times_K = law_times(found.objective, found.parameterization.process, 4)
    least = found.parameterization.process.min_time
    expected = least + (1 - least) * torch.tensor([0.125, 0.375, 0.625, 0.875])
    torch.testing.assert_close(times_K, expected)


@pytest.mark.parametrize(
    ("process", "prediction"), [({"kind": "flow"}, "flow"), (VP, "eps"),
                                ({**VP, "num_levels": 1000}, "eps")],
)  # fmt: skip
def test_levels_are_the_same_noise_for_every_process(sampler, process, prediction):
    found = with_objective(sampler, nn.Identity(), process, prediction)
    levels = log_snr(found.parameterization.process, level_times(
        found.parameterization.process).double())  # fmt: skip
    assert levels.tolist() == pytest.approx(list(LEVELS), abs=0.1)


def test_what_is_not_finite_is_none_and_has_no_interval(sampler, pairs):
    broken = saying(sampler, lambda x, t, process: x * float("nan"))
    measured = errors(broken, pairs, torch.tensor([0.5]), batch_images=4)
    (row,) = curve(broken.parameterization.process, measured)
    assert row["loss"] is None
    assert "loss_low" not in row
    assert np.isnan(v_errors(broken.parameterization.process, measured)).all()
    assert with_interval(np.array([1.0, 2.0, 3.0])) == {"value": 2.0, "count": 3}
