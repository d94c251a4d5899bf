"""Read the pictures that drawing starts from: one to change, and a mask of where.

Letters: ``C`` latent channels, ``H W`` rows and columns of a latent.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainer.data.decode import decode_square
from trainer.drawing import Known
from trainer.errors import BadData, BadInput
from trainer.sampler import Pixels, Sampler


def read_known(sampler: Sampler, init: Path, mask: Path | None) -> Known:
    """Encode a picture, and bring its mask to the latents' size by area.

    Args:
        sampler: Whose autoencoder and sizes.
        init: A picture; its centre square counts.
        mask: White where to draw, black where to keep; of the same size.

    Raises:
        BadInput: A file is missing, no picture, or the two differ in size.
    """
    side_px = sampler.image_side_px
    latents_CHW = sampler.encode(_read(init, side_px, key="init"))
    if mask is None:
        return Known(latents_CHW, None)
    picture = _read(mask, side_px, key="mask")
    size, mask_size = ("{}x{}".format(*_size(path)) for path in (init, mask))
    if size != mask_size:
        raise BadInput(
            f"mask={mask} has {mask_size} px, but init={init} has {size}. Give a mask of the same "
            "size."
        )
    white = torch.from_numpy(picture.astype(np.float32)).mean(2) / 255
    _, height, width = latents_CHW.shape
    mask_HW = torch.nn.functional.adaptive_avg_pool2d(white[None, None], (height, width))
    return Known(latents_CHW, mask_HW[0, 0].to(latents_CHW))


def _read(path: Path, side_px: int, *, key: str) -> Pixels:
    try:
        return decode_square(path.read_bytes(), side_px, name=str(path))
    except (OSError, BadData) as error:
        raise BadInput(
            f"{key}={path} cannot be read: {error}. Give a JPEG, PNG or WebP."
        ) from error


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size
