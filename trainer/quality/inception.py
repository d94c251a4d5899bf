"""The Inception v3 of the Frechet Inception Distance, in plain torch.

The network of Szegedy et al. 2016 as TensorFlow's checkpoint of 2015-12-05 has it, by which Heusel
et al. 2017 defined FID. It differs from torchvision's in that average pools leave out the padding,
and that the last block pools by the maximum. Names of the weights are torchvision's, as in
pt_inception-2015-12-05-6726825d.pth, which pytorch-fid publishes.

Letters: ``B`` pictures, ``C`` channels, ``H W`` rows and columns, ``D`` width of a feature.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.quality.weights import find_weights, load_weights

SIDE_PX = 299

_average = partial(
    functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False
)
_maximum = partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve = partial(functional.max_pool2d, kernel_size=3, stride=2)

_Step = tuple[str, int, int, int]
"""A convolution: name, channels that it gives, rows and columns of its kernel."""


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU; padded, it keeps the size."""

    def __init__(self, channels: int, step: _Step, *, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        _, out, rows, columns = step
        padding = (rows // 2, columns // 2) if padded else 0
        self.conv = nn.Conv2d(channels, out, (rows, columns), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        normed: Tensor = self.bn(self.conv(x_BCHW))
        return normed.relu()


class _Block(nn.Module):
    """Chains of convolutions, and a pool, side by side.

    Args:
        channels: Of the input.
        chains: The steps of each chain.
        pooled: Channels of the convolution behind the pool; 0 makes a block that halves the size,
            by the last step of every chain and by a pool that no convolution follows.
        maximum: Pool by the maximum, not by the average.
        forks: The last two steps of chains of three or more stand side by side.
    """

    def __init__(
        self,
        channels: int,
        chains: Sequence[Sequence[_Step]],
        *,
        pooled: int = 0,
        maximum: bool = False,
        forks: bool = False,
    ) -> None:
        super().__init__()
        self._pool = (_maximum if maximum else _average) if pooled else _halve
        self._chains = [_split(chain, forks=forks) for chain in chains]
        stride = 1 if pooled else 2
        for steps, ends in self._chains:
            width = channels
            for step in steps:
                self.add_module(step[0], _Conv(width, step))
                width = step[1]
            for end in ends:
                self.add_module(end[0], _Conv(width, end, stride=stride, padded=stride == 1))
        if pooled:
            self.branch_pool = _Conv(channels, ("branch_pool", pooled, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        found = []
        for steps, ends in self._chains:
            y = x_BCHW
            for name, *_ in steps:
                y = self.get_submodule(name)(y)
            found += [self.get_submodule(name)(y) for name, *_ in ends]
        pooled = self._pool(x_BCHW)
        found.append(self.branch_pool(pooled) if hasattr(self, "branch_pool") else pooled)
        return torch.cat(found, 1)


def _split(chain: Sequence[_Step], *, forks: bool) -> tuple[Sequence[_Step], Sequence[_Step]]:
    num_ends = 2 if forks and len(chain) > 2 else 1
    return chain[:-num_ends], chain[-num_ends:]


_TRIPLE = [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3)]


def _block_a(channels: int, pooled: int) -> _Block:
    fives = [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 5)]
    return _Block(channels, [[("branch1x1", 64, 1, 1)], fives, _TRIPLE], pooled=pooled)


def _block_b(channels: int) -> _Block:
    return _Block(channels, [[("branch3x3", 384, 3, 3)], _TRIPLE])


def _block_c(channels: int, width: int) -> _Block:
    sevens = [
        ("branch7x7_1", width, 1, 1),
        ("branch7x7_2", width, 1, 7),
        ("branch7x7_3", 192, 7, 1),
    ]
    fives = [
        ("branch7x7dbl_1", width, 1, 1),
        ("branch7x7dbl_2", width, 7, 1),
        ("branch7x7dbl_3", width, 1, 7),
        ("branch7x7dbl_4", width, 7, 1),
        ("branch7x7dbl_5", 192, 1, 7),
    ]
    return _Block(channels, [[("branch1x1", 192, 1, 1)], sevens, fives], pooled=192)


def _block_d(channels: int) -> _Block:
    threes = [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 3)]
    sevens = [
        ("branch7x7x3_1", 192, 1, 1),
        ("branch7x7x3_2", 192, 1, 7),
        ("branch7x7x3_3", 192, 7, 1),
        ("branch7x7x3_4", 192, 3, 3),
    ]
    return _Block(channels, [threes, sevens])


def _block_e(channels: int, *, maximum: bool = False) -> _Block:
    threes = [("branch3x3_1", 384, 1, 1), ("branch3x3_2a", 384, 1, 3), ("branch3x3_2b", 384, 3, 1)]
    doubles = [
        ("branch3x3dbl_1", 448, 1, 1),
        ("branch3x3dbl_2", 384, 3, 3),
        ("branch3x3dbl_3a", 384, 1, 3),
        ("branch3x3dbl_3b", 384, 3, 1),
    ]
    chains = [[("branch1x1", 320, 1, 1)], threes, doubles]
    return _Block(channels, chains, pooled=192, maximum=maximum, forks=True)


class Inception(nn.Module):
    """Pictures -> the last average pool ("pool3")."""

    width = 2048
    preprocessing = f"bilinear to {SIDE_PX} px without antialias, -1 to 1"

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, ("", 32, 3, 3), stride=2, padded=False)
        self.Conv2d_2a_3x3 = _Conv(32, ("", 32, 3, 3), padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, ("", 64, 3, 3))
        self.Conv2d_3b_1x1 = _Conv(64, ("", 80, 1, 1))
        self.Conv2d_4a_3x3 = _Conv(80, ("", 192, 3, 3), padded=False)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, 128)
        self.Mixed_6c = _block_c(768, 160)
        self.Mixed_6d = _block_c(768, 160)
        self.Mixed_6e = _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280)
        self.Mixed_7c = _block_e(2048, maximum=True)

    def forward(self, pictures_BCHW: Tensor) -> Tensor:
        """Give ``(B, 2048)`` features of ``(B, 3, H, W)`` pictures, 0 to 1, of any size.

        The resizing is that of pytorch-fid. It takes no averages: pictures much larger than
        299 px alias, as in all published numbers but those of clean-fid (Parmar et al. 2022).
        """
        x = functional.interpolate(
            pictures_BCHW, (SIDE_PX, SIDE_PX), mode="bilinear", align_corners=False
        )
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x))))
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


def load_inception(path: str) -> Inception:
    """Load the network from a folder or a hub name.

    Raises:
        BadInput: No weights are there, or those of another network.
        BadWorld: The model hub did not give them.
    """
    net = Inception()
    load_weights(net, find_weights(path), unused=_is_unused)
    return net


def _is_unused(name: str) -> bool:
    """Whether no feature depends on a tensor: classifiers, and counts that old files lack."""
    return name.startswith(("fc.", "AuxLogits.")) or name.endswith("num_batches_tracked")
