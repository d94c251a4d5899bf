"""Find faces with CenterFace and blur them."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.config_scorers import ScorersConfig
from data_prep.scorers import Picture, weights_path
from trainer.errors import BadInput

SIDE_PX = 512
_STRIDE_PX = 4
_OVERLAP = 0.3
_OUTPUTS = ("537", "538", "539")  # probability, log size, offset; the names in the file


class FaceBlur:
    """CenterFace (Xu et al. 2019), run by OpenCV."""

    def __init__(self, net: Any, *, min_confidence: float) -> None:  # noqa: ANN401 - untyped
        self._net, self._min_confidence = net, min_confidence

    def __call__(self, picture: Picture) -> tuple[Picture, int]:
        """Give the picture with its faces blurred, and their number."""
        boxes = self.find(picture)
        return (blur(picture, boxes) if len(boxes) else picture), len(boxes)

    def find(self, picture: Picture) -> NDArray[np.float32]:
        """Give `(N, 4)` boxes in px: left, top, right, bottom."""
        height, width = picture.shape[:2]
        scale = SIDE_PX / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        # Always one shape: OpenCV 4.14 keeps state of a former one, and finds faces everywhere.
        square = np.zeros((SIDE_PX, SIDE_PX, 3), np.float32)
        square[: size[1], : size[0]] = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        self._net.setInput(np.ascontiguousarray(square.transpose(2, 0, 1)[None]))
        boxes = _decode(*self._net.forward(_OUTPUTS), min_confidence=self._min_confidence)
        limits = np.array([width, height, width, height], np.float32)
        inside: NDArray[np.float32] = np.clip(boxes / np.float32(scale), 0, limits)
        return inside


def build(cfg: ScorersConfig) -> FaceBlur:
    """Load the weights that the config names.

    Raises:
        BadInput: They are not CenterFace's.
    """
    assert cfg.faces.weights is not None
    path = weights_path("faces", cfg.faces.weights)
    try:
        net = cv2.dnn.readNetFromONNX(str(path))
    except cv2.error as error:
        raise BadInput(f"scorers.faces.weights={path} is no ONNX network ({error}).") from error
    if not set(_OUTPUTS) <= set(net.getUnconnectedOutLayersNames()):
        raise BadInput(f"scorers.faces.weights={path} is not CenterFace.")
    return FaceBlur(net, min_confidence=cfg.faces.min_confidence)


def _decode(
    probability: NDArray[np.float32],
    log_size: NDArray[np.float32],
    offset: NDArray[np.float32],
    *,
    min_confidence: float,
) -> NDArray[np.float32]:
    """Turn `(1, C, h, w)` maps into `(N, 4)` boxes that overlap little."""
    rows, columns = np.nonzero(probability[0, 0] >= min_confidence)
    confidence = probability[0, 0, rows, columns]
    cells = np.stack([rows, columns])
    centres = (cells + offset[0, :, rows, columns].T + 0.5) * _STRIDE_PX
    sizes = np.exp(log_size[0, :, rows, columns].T) * _STRIDE_PX
    top, left = centres - sizes / 2
    height, width = sizes
    corners = np.stack([left, top, width, height], axis=1)
    kept = cv2.dnn.NMSBoxes(corners.tolist(), confidence.tolist(), min_confidence, _OVERLAP)
    boxes = corners[np.asarray(kept, np.int64).reshape(-1)]
    boxes[:, 2:] += boxes[:, :2]
    return boxes.astype(np.float32)


def blur(picture: Picture, boxes: NDArray[np.float32]) -> Picture:
    """Blur boxes with soft borders.

    As Yang et al. 2022, A Study of Face Obfuscation in ImageNet, did: boxes grow by a tenth of
    their diagonal on each side, and both picture and mask are blurred by a tenth of the largest.

    Args:
        picture: Is not changed.
        boxes: `(N, 4)` left, top, right, bottom in px, N > 0.
    """
    mask = np.zeros(picture.shape[:2], np.float32)
    diagonals = np.hypot(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    for (left, top, right, bottom), diagonal in zip(boxes, diagonals, strict=True):
        edge = diagonal / 10
        rows = slice(max(0, round(top - edge)), max(0, round(bottom + edge)))
        columns = slice(max(0, round(left - edge)), max(0, round(right + edge)))
        mask[rows, columns] = 1
    sigma = max(1.0, float(diagonals.max()) / 10)
    soft = cv2.GaussianBlur(mask, (0, 0), sigma)[:, :, None]
    blurred = cv2.GaussianBlur(picture, (0, 0), sigma)
    mixed: Picture = np.round(soft * blurred + (1 - soft) * picture).astype(np.uint8)
    return mixed
