"""Pictures -> features of a pretrained network, whatever the network and the size of batches.

Letters: ``N`` pictures, ``H W`` rows and columns, ``D`` width of a feature.
"""

import hashlib
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trainer.config_quality import (
    ClipFeaturesConfig,
    EfficientNetConfig,
    FeaturesConfig,
    InceptionConfig,
)
from trainer.errors import BadInput
from trainer.quality.clip import Clip, load_clip
from trainer.quality.efficientnet import EfficientNetLite0, load_efficientnet_lite0
from trainer.quality.inception import Inception, load_inception

Pictures = NDArray[np.uint8]
"""``(N, H, W, 3)``, RGB."""
Rows = NDArray[np.float32]
"""``(N, D)``."""
Network = EfficientNetLite0 | Clip | Inception


class Features(Protocol):
    """What the measures of quality may ask of a network."""

    name: str
    """The kind of network."""
    fingerprint: str
    """Hash of weights and preprocessing, 16 hex digits: equal ones give comparable features."""
    width: int
    """D."""

    def __call__(self, pictures: Pictures) -> Rows:
        """Give ``(N, D)`` features of ``(N, H, W, 3)`` pictures; neighbours do not matter."""


class NetworkFeatures:
    """A frozen network that is given pictures in batches."""

    def __init__(self, name: str, net: Network, *, device: str, batch_images: int) -> None:
        self.name, self.net, self.width = name, net.float().eval().requires_grad_(False), net.width
        self.fingerprint = _fingerprint(name, net)
        self.net.to(device)
        self._device, self._batch_images = device, batch_images

    @torch.inference_mode()
    def __call__(self, pictures: Pictures) -> Rows:
        """Give ``(N, D)`` features of ``(N, H, W, 3)`` pictures.

        Raises:
            BadInput: The pictures have another shape or type.
        """
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
            raise BadInput(
                f"got pictures of shape {pictures.shape} and type {pictures.dtype}; features need "
                "(N, H, W, 3) and uint8."
            )
        found = np.empty((len(pictures), self.width), np.float32)
        for start in range(0, len(pictures), self._batch_images):
            # A copy: torch takes neither reversed arrays nor read-only ones.
            batch = torch.from_numpy(pictures[start : start + self._batch_images].copy())
            features = self.net(batch.to(self._device).permute(0, 3, 1, 2).float() / 255)
            found[start : start + self._batch_images] = features.cpu().numpy()
        return found


def load_features(cfg: FeaturesConfig, *, device: str, batch_images: int) -> NetworkFeatures:
    """Load a network that gives features.

    Args:
        cfg: Which.
        device: cpu or cuda.
        batch_images: Pictures per pass; features do not depend on it, but for rounding.

    Raises:
        BadInput: The network, its package or the device is not there.
        BadWorld: The model hub did not give the weights.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("device=cuda, but torch sees no GPU here: use device=cpu.")
    net: Network
    match cfg:
        case EfficientNetConfig(side_px=side_px):
            net = load_efficientnet_lite0(side_px=side_px)
        case ClipFeaturesConfig(path=path):
            net = load_clip(path)
        case InceptionConfig(path=path):
            net = load_inception(path)
    return NetworkFeatures(cfg.kind, net, device=device, batch_images=batch_images)


def _fingerprint(name: str, net: nn.Module) -> str:
    digest = hashlib.sha256(f"{name}\n{net.preprocessing}\n".encode())
    for key, value in sorted(net.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]
