"""The pictures of one `kiln sample`: which there are, which are done, drawing the others.

Batches are cut from the list of all pictures, done or not, and whole batches are drawn: so the
bits of a picture do not depend on how often the command was stopped or on who shares the work.
"""

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from trainer.config_tools import SamplingConfig
from trainer.drawing import Known
from trainer.errors import BadInput
from trainer.gallery import INDEX, sample_name
from trainer.labels import Label, is_complete, png_bytes, publish_labelled
from trainer.observe.countdown import Countdown
from trainer.sampler import Asked, Pixels, Sampler
from trainer.watermark import embed

SIDECAR_BYTES = 4096
_REPEAT_BIT = 32


@dataclass(frozen=True, slots=True)
class Wanted:
    """A picture that the command asks for."""

    prompt: str
    number: int
    """Of the prompt."""
    repeat: int
    """Which of the prompt's pictures, from 0."""

    @property
    def name(self) -> str:
        """Its file's, without suffix."""
        return sample_name(self.number, self.repeat)

    @property
    def asked(self) -> Asked:
        """What the sampler is to draw; no two pictures share noise."""
        return self.prompt, self.number | self.repeat << _REPEAT_BIT

    def label(self, common: Label) -> Label:
        """Add to what all pictures have in common what is this one's own."""
        return {"prompt": self.prompt, "number": self.number, "repeat": self.repeat, **common}


@dataclass(frozen=True)
class Work:
    """How one process draws its share into a folder."""

    folder: Path
    sampler: Sampler
    sampling: SamplingConfig
    known: Known | None
    label: Label
    """What all pictures have in common."""
    watermark: str | None
    part: int
    parts: int


def wanted(prompts: Sequence[str], images_per_prompt: int) -> list[Wanted]:
    """List all pictures, those of one prompt together."""
    return [
        Wanted(prompt, number, repeat)
        for number, prompt in enumerate(prompts)
        for repeat in range(images_per_prompt)
    ]


def batches_of(pictures: Sequence[Wanted], work: Work) -> list[Sequence[Wanted]]:
    """Cut all pictures into batches and return those of this part."""
    size = work.sampling.batch_images
    every = [pictures[first : first + size] for first in range(0, len(pictures), size)]
    return every[work.part :: work.parts]


def draw_pictures(work: Work, pictures: Sequence[Wanted]) -> int:
    """Draw what is missing of this part; return how many pictures that were.

    Raises:
        BadWorld: The network gave something that is no finite number; what was done stays.
    """
    todo = []
    for batch in batches_of(pictures, work):
        missing = {p.name for p in batch if not is_done(work, p)}
        if missing:
            todo.append((batch, missing))
    if not todo:
        return 0
    (work.folder / INDEX).unlink(missing_ok=True)
    asked = [[picture.asked for picture in batch] for batch, _ in todo]
    total = sum(map(len, asked)) * work.sampling.num_steps
    with (
        Countdown("sampling", total, unit="steps") as countdown,
        closing(
            work.sampler.draw(asked, work.sampling, known=work.known, on_steps=countdown.advance)
        ) as drawn,
    ):
        for (batch, missing), pixels in zip(todo, drawn, strict=True):
            for picture, each in zip(batch, pixels, strict=True):
                if picture.name in missing:
                    _publish(work, picture, each)
    return sum(len(missing) for _, missing in todo)


def is_done(work: Work, picture: Wanted) -> bool:
    """Whether a picture is there, whole, and made as this command asks."""
    return is_complete(work.folder, picture.name, picture.label(work.label))


def require_room(folder: Path, *, num_pictures: int, side_px: int, num_variances: int = 0) -> None:
    """Refuse to begin what the disk cannot hold, by the size of uncompressed pictures.

    Raises:
        BadInput: It cannot.
    """
    there = sum(1 for _ in folder.glob("sample_*.json")) if folder.is_dir() else 0
    picture_bytes = 3 * side_px**2 + SIDECAR_BYTES
    variance_bytes = 4 * 3 * side_px**2 + picture_bytes  # float32 numbers and their heat map
    missing = max(0, num_pictures + num_variances - there)
    need = missing * picture_bytes + min(missing, num_variances) * (variance_bytes - picture_bytes)
    place = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(place).free
    if need > free:
        raise BadInput(
            f"{num_pictures} pictures of {side_px}x{side_px} px, {missing} of them still to draw, "
            f"need up to {need / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free. Give "
            f"out= another disk, or at most {free // picture_bytes} pictures at a time."
        )


def _publish(work: Work, picture: Wanted, pixels: Pixels) -> None:
    label = picture.label(work.label)
    if work.watermark:
        pixels = embed(pixels, work.watermark)
    data = png_bytes(pixels, label)
    publish_labelled(work.folder, picture.name, label, {f"{picture.name}.png": data})
