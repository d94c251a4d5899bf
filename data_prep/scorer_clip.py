"""Score how well picture and caption agree, and how pleasing a picture is, on CLIP's embeddings.

Letters: ``B`` pictures, ``L`` tokens, ``D`` width of an embedding.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from data_prep.config_scorers import ScorersConfig
from data_prep.scorers import Picture, Scores
from trainer.errors import BadInput
from trainer.models.loading import load_frozen
from trainer.models.locations import locate

# Of the pictures that OpenAI's CLIP was trained on; OpenCLIP's models use them too.
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_NO_HEAD = (OSError, ValueError, KeyError, RuntimeError, AttributeError, pickle.PickleError)


class ClipScorer:
    """A CLIP of transformers, with its tokenizer and perhaps an aesthetic head."""

    def __init__(self, model: Any, tokenizer: Any, head: tuple[Tensor, Tensor] | None) -> None:  # noqa: ANN401
        self._model, self._tokenizer, self._head = model, tokenizer, head
        self._side_px: int = model.config.vision_config.image_size
        self._num_tokens: int = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def __call__(
        self, pictures: Sequence[Picture], captions: Sequence[str]
    ) -> Mapping[str, Scores]:
        """Give `score.clip`, -1 to 1, and with a head `score.aesthetic`."""
        # All of one length: a caption's embedding does not depend on its neighbours.
        tokens = self._tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self._num_tokens,
            return_tensors="pt",
        )
        pixels = np.stack([preprocess(picture, side_px=self._side_px) for picture in pictures])
        found = self._model(
            input_ids=tokens["input_ids"].to(self._model.device),
            attention_mask=tokens["attention_mask"].to(self._model.device),
            pixel_values=torch.from_numpy(pixels).to(self._model.device),
        )
        image_BD, text_BD = found.image_embeds.cpu(), found.text_embeds.cpu()
        scores = {"score.clip": (image_BD * text_BD).sum(-1).numpy()}
        if self._head is not None:
            weight_D, bias = self._head
            scores["score.aesthetic"] = (image_BD @ weight_D + bias).numpy()
        return scores


def build(cfg: ScorersConfig) -> ClipScorer:
    """Load the model that the config names.

    Raises:
        BadInput: It is no CLIP, its tokenizer is missing, or the head belongs to another one.
        BadWorld: The model hub did not give it.
    """
    assert cfg.clip.weights is not None
    if cfg.clip.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("scorers.clip.device=cuda, but torch sees no GPU here: use cpu.")
    # Sums in a fixed order; processes are what runs side by side here.
    torch.set_num_threads(1)
    folder = locate(cfg.clip.weights)
    model = load_frozen(CLIPModel, folder).to(cfg.clip.device)
    head = None
    if cfg.clip.aesthetic_head:
        head = load_head(Path(cfg.clip.aesthetic_head), width=model.config.projection_dim)
    return ClipScorer(model, _load_tokenizer(folder), head)


def _load_tokenizer(folder: Path) -> Any:  # noqa: ANN401 - transformers is untyped
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"scorers.clip.weights={folder} holds no tokenizer ({reason}).") from error


def preprocess(picture: Picture, *, side_px: int) -> NDArray[np.float32]:
    """Give `(3, side_px, side_px)`: shorter side resized (bicubic), centre crop, normalised."""
    height, width = picture.shape[:2]
    scale = side_px / min(height, width)
    size = max(side_px, int(width * scale)), max(side_px, int(height * scale))
    resized = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side_px) // 2, (size[1] - side_px) // 2
    cropped = resized.crop((left, top, left + side_px, top + side_px))
    pixels = (np.asarray(cropped, np.float32) / 255 - _MEAN) / _STD
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def load_head(path: Path, *, width: int) -> tuple[Tensor, Tensor]:
    """Read an aesthetic predictor of LAION as the one affine map that it is.

    The first version is a linear layer; the second a chain of them, with nothing between.

    Args:
        path: `.safetensors`, or a state dict that torch saved.
        width: D, of the CLIP that it is for.

    Returns:
        ``(D,)`` weight and ``()`` bias.

    Raises:
        BadInput: The file holds something else, or the head of another CLIP.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        names = sorted(name for name in state if name.endswith("weight"))
        weight, bias = torch.eye(width), torch.zeros(width)
        for name in names:
            layer = state[name].float()
            weight, bias = layer @ weight, layer @ bias + state[name[:-6] + "bias"].float()
    except _NO_HEAD as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(
            f"scorers.clip.aesthetic_head={path} is no aesthetic predictor for a CLIP of width "
            f"{width} ({reason}). Give the one that was trained on scorers.clip.weights."
        ) from error
    if weight.shape != (1, width) or not names:
        raise BadInput(
            f"scorers.clip.aesthetic_head={path} maps to {tuple(weight.shape)}, need (1, {width})."
        )
    return weight[0], bias[0]
