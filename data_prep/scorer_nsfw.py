"""Score how unsafe for work a picture is, by Yahoo's open_nsfw."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.config_scorers import ScorersConfig
from data_prep.onnx_model import open_onnx
from data_prep.scorers import Picture, Scores, weights_path

_RESIZED_PX, _SIDE_PX = 256, 224
_MEAN_BGR = np.array([104, 117, 123], np.float32)


class NsfwScorer:
    """open_nsfw, a thin ResNet-50, as ONNX."""

    def __init__(self, session: Any) -> None:  # noqa: ANN401 - onnxruntime is untyped
        self._session = session
        self._input = session.get_inputs()[0].name

    def __call__(
        self, pictures: Sequence[Picture], captions: Sequence[str]
    ) -> Mapping[str, Scores]:
        """Give `score.nsfw`, 0 to 1, for each picture."""
        del captions
        inputs = np.stack([preprocess(picture) for picture in pictures])
        (probabilities,) = self._session.run(None, {self._input: inputs})
        return {"score.nsfw": probabilities[:, 1]}


def build(cfg: ScorersConfig) -> NsfwScorer:
    """Load the weights that the config names."""
    assert cfg.nsfw.weights is not None
    path = weights_path("nsfw", cfg.nsfw.weights)
    shape = (None, _SIDE_PX, _SIDE_PX, 3)
    return NsfwScorer(open_onnx(path, key="scorers.nsfw.weights", input_shape=shape))


def preprocess(picture: Picture) -> NDArray[np.float32]:
    """Give `(224, 224, 3)` BGR without the mean, as classify_nsfw.py of yahoo/open_nsfw does.

    The pass through JPEG is theirs: the network was trained on what came out of one.
    """
    resized = Image.fromarray(picture).resize((_RESIZED_PX, _RESIZED_PX), Image.Resampling.BILINEAR)
    with BytesIO() as buffer:
        resized.save(buffer, "JPEG")
        decoded = np.asarray(Image.open(buffer), np.float32)
    edge = (_RESIZED_PX - _SIDE_PX) // 2
    cropped = decoded[edge : edge + _SIDE_PX, edge : edge + _SIDE_PX, ::-1]
    return np.ascontiguousarray(cropped - _MEAN_BGR)
