"""CLIP's image and text towers, with the texts that its score compares pictures with.

Letters: ``B`` pictures or texts, ``C`` channels, ``H W`` rows and columns, ``D`` width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel

from trainer.errors import BadInput
from trainer.models.loading import load_frozen
from trainer.models.locations import locate
from trainer.quality.pixels import normalised, resized

# Of the pictures that OpenAI's CLIP was trained on; OpenCLIP's models use them too.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_VOCABULARIES = ("tokenizer.json", "vocab.json")


class Clip(nn.Module):
    """Pictures, or texts -> CLIP's common space; not of length 1, as the towers give them."""

    def __init__(self, model: Any, tokenizer: Any) -> None:  # noqa: ANN401 - untyped
        super().__init__()
        self.model, self._tokenizer = model, tokenizer
        self._side_px: int = model.config.vision_config.image_size
        self._num_tokens: int = model.config.text_config.max_position_embeddings
        self.width: int = model.config.projection_dim
        self.preprocessing = (
            f"shorter side bicubic to {self._side_px} px, centre crop, mean {_MEAN}, std {_STD}"
        )

    def forward(self, pictures_BCHW: Tensor) -> Tensor:
        """Give ``(B, D)`` features of ``(B, 3, H, W)`` pictures, 0 to 1, of any size."""
        height, width = pictures_BCHW.shape[2:]
        scale = self._side_px / min(height, width)
        rows, columns = (max(self._side_px, int(side * scale)) for side in (height, width))
        larger = resized(pictures_BCHW, (rows, columns))
        top, left = (rows - self._side_px) // 2, (columns - self._side_px) // 2
        cropped = larger[:, :, top : top + self._side_px, left : left + self._side_px]
        found = self.model.vision_model(pixel_values=normalised(cropped, _MEAN, _STD))
        features: Tensor = self.model.visual_projection(found.pooler_output)
        return features

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Give ``(B, D)`` features of captions; longer ones than CLIP reads are cut."""
        # All of one length: a caption's features do not depend on its neighbours.
        tokens = self._tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self._num_tokens,
            return_tensors="pt",
        ).to(self.model.device)
        found = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        features: NDArray[np.float32] = (
            self.model.text_projection(found.pooler_output).cpu().numpy()
        )
        return features


def load_clip(path: str) -> Clip:
    """Load a CLIPModel of transformers and its tokenizer from a folder or a hub name.

    Raises:
        BadInput: It is no CLIP, or has no tokenizer.
        BadWorld: The model hub did not give it.
    """
    folder = locate(path)
    model = load_frozen(CLIPModel, folder)
    try:
        # Without its vocabulary transformers makes up a tokenizer that knows no word.
        if not any((folder / name).is_file() for name in _VOCABULARIES):
            raise OSError(f"none of {', '.join(_VOCABULARIES)}")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"{folder} holds a CLIP, but no tokenizer ({reason}).") from error
    return Clip(model, tokenizer)
