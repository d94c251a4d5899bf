"""The network that tells pictures from reconstructions, patch by patch.

Letters: ``B`` pictures, ``C`` channels, ``H W`` rows and columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from trainer.config_first_stage import DiscriminatorConfig


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit per patch, positive where it looks like a picture.

    Its norms are over groups of channels of one picture, not over the batch as in the paper: what
    a picture costs then depends neither on its neighbours nor on the number of ranks.
    """

    def __init__(self, cfg: DiscriminatorConfig) -> None:
        super().__init__()
        first, *_, last = cfg.block_channels
        steps = list(pairwise(cfg.block_channels))
        layers: list[nn.Module] = [nn.Conv2d(3, first, 4, 2, 1), nn.LeakyReLU(0.2)]
        for number, (before, after) in enumerate(steps, start=1):
            stride = 1 if number == len(steps) else 2
            layers += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),
                nn.GroupNorm(cfg.norm_groups, after),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(last, 1, 4, 1, 1))

    def forward(self, pictures_BCHW: Tensor) -> Tensor:
        """Give ``(B, 1, H, W)`` logits of ``(B, 3, H, W)`` pictures in [-1, 1]; B may be 0."""
        logits: Tensor = self.layers(pictures_BCHW)
        return logits


@contextmanager
def held_constant(net: nn.Module) -> Iterator[None]:
    """Make calls of `net` inside give gradients to what it is given, and none to its parameters.

    Under ZeRO-3 too, where copies of the parameters (torch.func.functional_call) would be empty:
    weights are gathered for the module itself.
    """
    params = [param for param in net.parameters() if param.requires_grad]
    for param in params:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in params:
            param.requires_grad_(True)


def build_discriminator(cfg: DiscriminatorConfig, *, seed: int) -> PatchDiscriminator:
    """Make a fresh discriminator with the paper's first weights; equal seeds give equal ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = PatchDiscriminator(cfg)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return net
