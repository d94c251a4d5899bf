"""Laws of a first stage's losses."""

import pytest
import torch

from trainer.diffusion.first_stage import (
    deceiving_loss,
    feature_distance,
    hinge_loss,
    kl_to_standard_normal,
    reconstruction_loss,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_kl_is_zero_only_at_the_standard_normal():
    zero = torch.zeros(2, 4, 3, 3)
    assert (kl_to_standard_normal(zero, zero) == 0).all()
    assert (kl_to_standard_normal(zero + 0.5, zero) == 0.125).all()
    assert (kl_to_standard_normal(zero, zero - 1) > 0).all()


def test_a_perfect_reconstruction_pays_only_for_its_latent():
    x0 = torch.randn(4, 3, 8, 8)
    zero = torch.zeros(4, 4, 3, 3)
    weights = {"absolute_weight": 1.0, "kl_weight": 0.1}
    assert (reconstruction_loss(x0, x0, zero, zero, **weights) == 0).all()
    latent_only = reconstruction_loss(x0, x0, zero + 1, zero, **weights)
    torch.testing.assert_close(latent_only, torch.full((4,), 0.05))


def test_errors_cost_their_square_and_their_size():
    x0 = torch.randn(4, 3, 8, 8)
    zero = torch.zeros(4, 4, 3, 3)
    loss_B = reconstruction_loss(x0, x0 + 0.5, zero, zero, absolute_weight=0.2, kl_weight=0.0)
    torch.testing.assert_close(loss_B, torch.full((4,), 0.25 + 0.2 * 0.5))


def features(count=4):
    return [torch.randn(count, width, side, side) for width, side in ((5, 8), (7, 4), (3, 1))]


def test_a_feature_distance_is_zero_only_between_equals_and_has_no_order():
    a, b = features(), features()
    assert (feature_distance(a, a) == 0).all()
    assert (feature_distance(a, b) > 0).all()
    assert torch.equal(feature_distance(a, b), feature_distance(b, a))


def test_a_feature_distance_asks_for_directions_alone():
    a, b = features(), features()
    longer = [feature * factor for feature, factor in zip(a, (0.1, 3, 50), strict=True)]
    torch.testing.assert_close(feature_distance(longer, b), feature_distance(a, b))
    assert (feature_distance(a, longer) < 1e-10).all()
    opposite = [-feature for feature in a]
    torch.testing.assert_close(feature_distance(a, opposite), torch.full((4,), 3 * 4.0))


def test_unweighted_channels_give_twice_the_cosine_distance():
    a, b = features(), features()
    similar = [torch.cosine_similarity(x, y, dim=1).mean((1, 2)) for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(feature_distance(a, b), sum(2 - 2 * each for each in similar))


def test_weights_of_channels_share_out_the_distance():
    a, b = features(), features()
    ones = [torch.ones(feature.shape[1]) for feature in a]
    torch.testing.assert_close(feature_distance(a, b, ones), feature_distance(a, b))
    first = [torch.arange(len(one)).eq(0).float() for one in ones]
    rest = [one - each for one, each in zip(ones, first, strict=True)]
    torch.testing.assert_close(
        feature_distance(a, b, first) + feature_distance(a, b, rest), feature_distance(a, b)
    )


def test_features_of_zero_have_a_finite_gradient():
    a = [torch.zeros(2, 3, 4, 4, requires_grad=True)]
    feature_distance(a, [torch.randn(2, 3, 4, 4)]).sum().backward()
    assert a[0].grad.isfinite().all()


def test_a_hinge_loss_is_one_for_no_opinion_and_zero_for_a_sure_one():
    patches = torch.zeros(3, 1, 2, 2)
    assert torch.equal(hinge_loss(patches, patches), torch.ones(3))
    assert torch.equal(hinge_loss(patches + 1, patches - 1), torch.zeros(3))
    assert torch.equal(hinge_loss(patches + 9, patches - 9), torch.zeros(3))
    assert torch.equal(hinge_loss(patches - 1, patches + 1), torch.full((3,), 2.0))


def test_deceiving_pays_patch_by_patch():
    patches = torch.randn(3, 1, 2, 2)
    torch.testing.assert_close(deceiving_loss(patches), -patches.mean((1, 2, 3)))
