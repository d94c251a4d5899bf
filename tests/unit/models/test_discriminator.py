"""Laws of the discriminator."""

import pytest
import torch

from trainer.config_first_stage import DiscriminatorConfig
from trainer.errors import BadInput
from trainer.frozen import freeze
from trainer.models.discriminator import build_discriminator, held_constant


def config(*widths, norm_groups=1):
    data = {"weight": 1.0, "start_images": 0, "block_channels": widths, "norm_groups": norm_groups}
    return freeze(DiscriminatorConfig, data)


@pytest.mark.parametrize("widths", [(5, 6), (8, 12, 10), (64, 128, 256, 512)])
def test_its_config_knows_its_size_and_the_smallest_picture(widths):
    cfg = config(*widths)
    net = build_discriminator(cfg, seed=0)
    assert sum(param.numel() for param in net.parameters()) == cfg.num_parameters
    side_px = cfg.smallest_side_px
    assert net(torch.zeros(1, 3, side_px, side_px)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        net(torch.zeros(1, 3, side_px - 1, side_px - 1))


@pytest.mark.parametrize(("widths", "sees_px"), [((4, 8, 16), 34), ((4, 8, 16, 32), 70)])
def test_a_logit_sees_the_patch_of_the_paper(widths, sees_px):
    """Without the norms, by which the whole picture has a part in every logit."""
    net = build_discriminator(config(*widths), seed=0)
    for name, module in net.layers.named_children():
        if isinstance(module, torch.nn.GroupNorm):
            net.layers[int(name)] = torch.nn.Identity()
    picture = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = net(picture)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    seen = picture.grad[0].abs().sum(0) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == sees_px


def test_neighbours_in_a_batch_do_not_matter():
    net = build_discriminator(config(8, 16, 16, norm_groups=4), seed=0)
    pictures = torch.rand(4, 3, 16, 16) * 2 - 1
    alone = torch.cat([net(picture[None]) for picture in pictures])
    torch.testing.assert_close(net(pictures), alone, rtol=1e-5, atol=1e-6)


def test_the_seed_alone_decides_its_first_weights():
    before = torch.random.get_rng_state()
    a, b, c = (build_discriminator(config(4, 6), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["layers.0.weight"], c["layers.0.weight"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_is_held_constant_hands_gradients_on_and_keeps_none():
    net = build_discriminator(config(4, 6), seed=0)
    picture = torch.randn(1, 3, 16, 16, requires_grad=True)
    with held_constant(net):
        logits = net(picture)
    assert all(param.requires_grad for param in net.parameters())
    logits.sum().backward()
    assert picture.grad.abs().sum() > 0
    assert all(param.grad is None for param in net.parameters())


def test_no_pictures_give_no_logits_and_gradients_of_zero():
    net = build_discriminator(config(4, 6), seed=0)
    logits = net(torch.zeros(0, 3, 16, 16))
    assert len(logits) == 0
    logits.sum().backward()
    assert all(not param.grad.any() for param in net.parameters())


def test_groups_that_do_not_divide_a_width_are_refused():
    with pytest.raises(BadInput, match=r"norm_groups=4 does not divide block_channels=6\. Try nor"):
        config(4, 8, 6, norm_groups=4)
    with pytest.raises(BadInput, match="block_channels"):
        config(4)
