"""Laws of an autoencoder's objective with a feature loss and a discriminator."""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from tests.tiny import tiny_config
from trainer.build import build_model, build_reconstruction
from trainer.data.sources import PictureBatch
from trainer.diffusion.first_stage import hinge_loss
from trainer.errors import BadInput
from trainer.models.autoencoders import TrainableAutoencoder
from trainer.plan import make_plan

MODEL = {
    "kind": "autoencoder_kl",
    "latent_channels": 3,
    "block_channels": [8, 12],
    "layers_per_block": 1,
    "norm_groups": 2,
    "mid_attention": False,
    "num_parameters": 10_000,
}
OBJECTIVE = {
    "kind": "reconstruction",
    "absolute_weight": 0.1,
    "kl_weight": 0.01,
    "crop_side_px": 0,
    "whole_frac": 1.0,
}
DISCRIMINATOR = {
    "weight": 0.5,
    "start_images": 100,
    "block_channels": [6, 8, 10],
    "norm_groups": 2,
}
CPU = torch.device("cpu")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(6, 3, 48, 48, generator=generator) * 2 - 1
    return PictureBatch(torch.arange(6), torch.zeros(6).long(), pictures)


def configure(**changes):
    return tiny_config(
        model=MODEL, objective=OBJECTIVE | changes, encoders__image_side_px=48, seed=3
    )


def gradients(cfg, batch, *, images_seen=100):
    """Take one backward pass of a fresh model; return losses and gradients by name."""
    model = build_model(cfg)
    loss_B = build_reconstruction(cfg, CPU)(model, batch, images_seen)
    loss_B.mean().backward()
    return loss_B.detach(), {name: param.grad for name, param in model.named_parameters()}


def separate_gradients(cfg, batch):
    """As papers have it: two losses and two backward passes, each with the other's part fixed."""
    model = build_model(cfg)
    plain, decoded = TrainableAutoencoder(model.inner), []

    def reconstruct(pictures, noise, _is_judging):
        found = plain(pictures, noise)
        decoded.append(found[0])
        return found

    alone = replace(cfg, objective=replace(cfg.objective, discriminator=None))
    loss_B = build_reconstruction(alone, CPU)(reconstruct, batch)
    constants = {name: param.detach() for name, param in model.discriminator.named_parameters()}
    deceived = functional_call(model.discriminator, constants, (decoded[0],))
    loss_B = loss_B - cfg.objective.discriminator.weight * deceived.mean((1, 2, 3))
    loss_B.mean().backward()
    fake = model.discriminator(decoded[0].detach())
    hinge_loss(model.discriminator(batch.pictures_BCHW), fake).mean().backward()
    return loss_B.detach(), {name: param.grad for name, param in model.named_parameters()}


def part(grads, prefix):
    return {name: grad for name, grad in grads.items() if name.startswith(prefix)}


def assert_same(some, others):
    assert some.keys() == others.keys()
    for name, grad in some.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-4, atol=1e-7, msg=name)


def test_one_backward_pass_is_two(batch):
    cfg = configure(discriminator=DISCRIMINATOR)
    (loss_B, grads), (expected_B, expected) = gradients(cfg, batch), separate_gradients(cfg, batch)
    assert_same(grads, expected)
    torch.testing.assert_close(loss_B, expected_B)  # the value is the autoencoder's loss alone


def test_a_discriminator_hears_nothing_of_what_the_autoencoder_wants(batch):
    mild = gradients(configure(discriminator=DISCRIMINATOR | {"weight": 0.0}), batch)[1]
    keen = gradients(configure(discriminator=DISCRIMINATOR | {"weight": 100.0}), batch)[1]
    assert_same(part(mild, "discriminator."), part(keen, "discriminator."))
    assert not torch.allclose(
        mild["inner.decoder.conv_out.bias"], keen["inner.decoder.conv_out.bias"]
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"discriminator": DISCRIMINATOR | {"weight": 0.0}},
        {"features": {"kind": "efficientnet_lite0", "weight": 0.0}},
    ],
    ids=["discriminator", "features"],
)
def test_a_weight_of_zero_changes_nothing_for_the_autoencoder(batch, changes):
    plain_B, plain = gradients(configure(), batch)
    loss_B, grads = gradients(configure(**changes), batch)
    torch.testing.assert_close(loss_B, plain_B)
    assert_same(part(grads, "inner."), plain)


def test_before_its_start_a_discriminator_changes_nothing_and_has_gradients_of_zero(batch):
    plain_B, plain = gradients(configure(), batch)
    early = configure(discriminator=DISCRIMINATOR)
    loss_B, grads = gradients(early, batch, images_seen=99)
    assert torch.equal(loss_B, plain_B)
    assert_same(part(grads, "inner."), plain)
    assert all(grad is not None and not grad.any() for grad in part(grads, "discr").values())
    late = part(gradients(early, batch)[1], "discr")
    # What the hinge asks of the last bias for real and for made pictures may cancel.
    assert all(grad.any() for name, grad in late.items() if name != "discriminator.layers.8.bias")


def test_losses_belong_to_their_pictures(batch):
    """Of crops and whole pictures, with every part of the objective."""
    cfg = configure(
        crop_side_px=32,
        whole_frac=0.5,
        discriminator=DISCRIMINATOR,
        features={"kind": "efficientnet_lite0", "weight": 0.3},
    )
    model, objective = build_model(cfg), build_reconstruction(cfg, CPU)
    with torch.no_grad():
        whole_B = objective(model, batch, 100)
        alone = [
            objective(
                model,
                PictureBatch(
                    batch.ids_B[n : n + 1], batch.visits_B[:1], batch.pictures_BCHW[n : n + 1]
                ),
                100,
            )
            for n in range(6)
        ]
    torch.testing.assert_close(whole_B, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_the_autoencoder_begins_as_it_would_alone():
    alone = build_model(configure()).state_dict()
    both = build_model(configure(discriminator=DISCRIMINATOR)).state_dict()
    assert all(torch.equal(alone[name], both[name]) for name in alone)


def test_a_plan_counts_the_discriminator():
    alone, both = (configure(), configure(discriminator=DISCRIMINATOR))
    count = sum(param.numel() for param in build_model(both).discriminator.parameters())
    assert both.num_parameters - alone.num_parameters == count
    assert make_plan(both).states_gib > make_plan(alone).states_gib


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_side_px": 64}, r"crop_side_px=64 is more than encoders\.image_side_px=48"),
        ({"crop_side_px": 15}, r"crop_side_px=15 is no multiple of 2, .* Try 14"),
        (
            {"crop_side_px": 10, "discriminator": DISCRIMINATOR},
            r"crop_side_px=10 is too small for objective\.discriminator\.block_channels, .* 12",
        ),
        (
            {"crop_side_px": 16, "features": {"kind": "efficientnet_lite0", "weight": 1.0}},
            "crop_side_px=16 is too small for objective.features.kind=efficientnet_lite0, .* 32",
        ),
        (
            {"features": {"kind": "vgg16", "weight": 1.0, "channel_weights": None}},
            "path is missing",
        ),
        (
            {"features": {"kind": "efficientnet_lite0", "weight": -1.0}},
            "greater than or equal to 0",
        ),
    ],
)
def test_what_no_network_can_take_is_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        configure(**changes)


def test_ranks_that_would_wait_for_each_other_are_refused():
    mixed = {"objective": OBJECTIVE | {"crop_side_px": 16, "whole_frac": 0.5}, "model": MODEL}
    fine = tiny_config(**mixed, engine__zero_stage=3)
    assert fine.objective.mixes_sides
    with pytest.raises(BadInput, match=r"zero_stage=3 .*whole_frac=0\.5 .*Try engine\.zero_st"):
        tiny_config(**mixed, engine__zero_stage=3, cluster__ranks_per_node=2)
