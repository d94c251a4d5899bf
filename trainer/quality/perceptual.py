"""Distances of pictures in the features of a frozen network at several depths, with gradients.

Letters: ``B`` pictures, ``C`` channels, ``H W`` rows and columns.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config_first_stage import EfficientNetLossConfig, Vgg16LossConfig
from trainer.diffusion.first_stage import feature_distance
from trainer.errors import BadInput
from trainer.quality.efficientnet import MEAN, STD, load_net
from trainer.quality.pixels import normalised
from trainer.quality.weights import find_weights, load_weights

# Channels that VGG16's convolutions give, depth by depth; a pool lies between two depths.
_VGG16 = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)


class EfficientNetDepths(nn.Module):
    """Pictures -> what EfficientNet-Lite0 has before each halving of the side, and at its end."""

    def __init__(self, net: Any) -> None:  # noqa: ANN401 - an untyped package
        super().__init__()
        self.net = net

    def forward(self, pictures_BCHW: Tensor) -> list[Tensor]:
        """Give the features of ``(B, 3, H, W)`` pictures as ImageNet's are normalised."""
        net, found = self.net, []
        x = net._swish(net._bn0(net._conv_stem(pictures_BCHW)))
        for block in net._blocks:
            y = block(x)
            if y.shape[2] < x.shape[2]:
                found.append(x)
            x = y
        return [*found, x]


class Vgg16Depths(nn.Module):
    """Pictures -> the five depths of VGG16 that LPIPS takes: relu1_2, 2_2, 3_3, 4_3 and 5_3.

    Names of the weights are torchvision's.
    """

    def __init__(self) -> None:
        super().__init__()
        before = 3
        layers: list[nn.Module] = []
        for depth, widths in enumerate(_VGG16):
            if depth:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, 1, 1), nn.ReLU()]
                before = width
        self.features = nn.Sequential(*layers)

    def forward(self, pictures_BCHW: Tensor) -> list[Tensor]:
        """Give the features of ``(B, 3, H, W)`` pictures as ImageNet's are normalised."""
        found, x = [], pictures_BCHW
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
            x = layer(x)
        return [*found, x]


class _ChannelWeights(nn.Module):
    """The file of the package lpips: a 1 x 1 convolution for each depth, behind a dropout."""

    def __init__(self) -> None:
        super().__init__()
        for depth, (*_, width) in enumerate(_VGG16):
            step = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{depth}", nn.ModuleDict({"model": step}))

    def tensors(self) -> list[Tensor]:
        return [weight.detach().flatten() for weight in self.parameters()]


class PerceptualDistance:
    """The distance; the network is no part of what is trained, and lies outside ZeRO."""

    def __init__(
        self, net: nn.Module, channel_weights: list[Tensor] | None, device: torch.device
    ) -> None:
        self._net = net.float().eval().requires_grad_(False).to(device)
        self._channel_weights = channel_weights and [each.to(device) for each in channel_weights]

    def __call__(self, ours_BCHW: Tensor, theirs_BCHW: Tensor) -> Tensor:
        """Return ``(B,)`` float32 for RGB pictures in [-1, 1]; gradients reach the first alone."""
        with torch.no_grad():
            theirs = self._features(theirs_BCHW)
        return feature_distance(self._features(ours_BCHW), theirs, self._channel_weights)

    def _features(self, pictures_BCHW: Tensor) -> list[Tensor]:
        found: list[Tensor] = self._net(normalised(0.5 * pictures_BCHW + 0.5, MEAN, STD))
        return found


def load_perceptual(
    cfg: EfficientNetLossConfig | Vgg16LossConfig, device: torch.device
) -> PerceptualDistance:
    """Load the network of a feature loss. Pictures are given to it in their own size.

    Raises:
        BadInput: The network or its package is not there, or its weights are another network's.
        BadWorld: The model hub did not give the weights.
    """
    if isinstance(cfg, EfficientNetLossConfig):
        return PerceptualDistance(EfficientNetDepths(load_net()), None, device)
    net = Vgg16Depths()
    load_weights(net, find_weights(cfg.path), unused=_is_classifier)
    weights = None if cfg.channel_weights is None else _read_channel_weights(cfg.channel_weights)
    return PerceptualDistance(net, weights, device)


def _read_channel_weights(path: str) -> list[Tensor]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise BadInput(
            f"objective.features.channel_weights={path} is no file. Give weights/v0.1/vgg.pth of "
            "the package lpips, or null."
        )
    net = _ChannelWeights()
    load_weights(net, file, unused=lambda _: False)
    return net.tensors()


def _is_classifier(name: str) -> bool:
    return name.startswith("classifier.")
