"""Score how much of a picture is covered by text, by a DB text detector."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.config_scorers import ScorersConfig
from data_prep.onnx_model import open_onnx
from data_prep.scorers import Picture, Scores, weights_path

# As rapidocr has them for PP-OCR; names as in Liao et al. 2020, Real-time Scene Text Detection.
_PIXEL_THRESHOLD, _BOX_THRESHOLD, _UNCLIP_RATIO = 0.3, 0.5, 1.6
_MIN_BOX_PX = 3
_MAX_LINE_FRAC = 0.25
_STRIDE_PX = 32


class TextShareScorer:
    """A network that gives each pixel the probability of text."""

    def __init__(self, session: Any, *, side_px: int) -> None:  # noqa: ANN401 - untyped
        self._session, self._side_px = session, side_px
        self._input = session.get_inputs()[0].name

    def __call__(
        self, pictures: Sequence[Picture], captions: Sequence[str]
    ) -> Mapping[str, Scores]:
        """Give `score.ocr`, 0 to 1, for each picture."""
        del captions
        return {"score.ocr": np.array([self._score(picture) for picture in pictures], np.float32)}

    def _score(self, picture: Picture) -> float:
        pixels = preprocess(picture, side_px=self._side_px)
        (probabilities,) = self._session.run(None, {self._input: pixels})
        return text_share(probabilities[0, 0])


def build(cfg: ScorersConfig) -> TextShareScorer:
    """Load the weights that the config names."""
    assert cfg.ocr.weights is not None
    path = weights_path("ocr", cfg.ocr.weights)
    session = open_onnx(path, key="scorers.ocr.weights", input_shape=(None, 3, None, None))
    return TextShareScorer(session, side_px=cfg.ocr.side_px)


def preprocess(picture: Picture, *, side_px: int) -> NDArray[np.float32]:
    """Give `(1, 3, H, W)` BGR in -1 to 1; H and W are near `side_px` times the aspect."""
    scale = side_px / min(picture.shape[:2])
    height, width = (max(1, round(side * scale / _STRIDE_PX)) for side in picture.shape[:2])
    resized = cv2.resize(picture, (width * _STRIDE_PX, height * _STRIDE_PX))
    pixels = resized[:, :, ::-1].astype(np.float32) / 127.5 - 1
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def text_share(probabilities: NDArray[np.float32]) -> float:
    """Give the share of `(H, W)` pixels that lie in boxes of text.

    The network marks the cores of lines. Each core's smallest rectangle, if it is probable enough,
    is grown on all sides by area * 1.6 / perimeter, which undoes how the cores were shrunk for
    training. Boxes higher than a quarter of the picture are left out: the network takes a single
    thing before a plain background for one big letter.
    """
    cores = (probabilities > _PIXEL_THRESHOLD).astype(np.uint8)
    contours, _ = cv2.findContours(cores, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    max_line_px = _MAX_LINE_FRAC * min(probabilities.shape)
    text = np.zeros(probabilities.shape, np.uint8)
    for contour in contours:
        centre, (width, height), angle = cv2.minAreaRect(contour)
        if min(width, height) < _MIN_BOX_PX:
            continue
        grown = _UNCLIP_RATIO * width * height / (width + height)  # on two sides
        if min(width, height) + grown > max_line_px:
            continue
        core = np.zeros_like(text)
        _fill(core, (centre, (width, height), angle))
        if cv2.mean(probabilities, core)[0] < _BOX_THRESHOLD:
            continue
        _fill(text, (centre, (width + grown, height + grown), angle))
    return float(text.mean())


def _fill(mask: NDArray[np.uint8], box: Any) -> None:  # noqa: ANN401 - OpenCV's rotated rectangle
    cv2.fillPoly(mask, [np.round(cv2.boxPoints(box)).astype(np.int32)], 1)
