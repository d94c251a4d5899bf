"""Write samples and reconstructions as pictures, a labelled grid and an index: RUN/samples."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.data.decode import cover, decode_bgr, decode_square
from trainer.data.manifest import Manifest, load_manifest
from trainer.data.publish import publish_bytes, publish_json, published
from trainer.data.shards import Shard, read_index
from trainer.labels import Label, png_bytes, publish_labelled
from trainer.place import place
from trainer.sampler import Pixels, Sampler

TILE_PX = 128
LABEL_PX = 46
GAP_PX = 8
COLUMNS = 8
GRID_PICTURES = 64
GRID, INDEX = "grid.png", "index.json"
_OURS = re.compile(
    r"((?:sample|real|reconstructed)_\d{4,}(?:_\d{2,})?(?:_variance)?)\.(?:png|json|npy)"
)
_PICTURES = ("jpg", "png", "webp")
_RIGHT, _WRONG, _PLAIN = (20, 120, 50), (170, 30, 30), (40, 40, 40)


@dataclass(frozen=True, slots=True)
class Shown:
    """A sample to show."""

    caption: str
    picture: Pixels
    ok: bool | None = None
    """Whether it shows what its caption says, where that was judged."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A real picture and what the autoencoder leaves of it."""

    caption: str
    real: Pixels
    reconstructed: Pixels


def write_gallery(
    folder: Path, samples: Sequence[Shown], pairs: Sequence[Pair], *, label: Label
) -> Path:
    """Replace the pictures in `folder`; the index comes last. Return the grid's path.

    Args:
        folder: Is made if need be.
        samples: To write and to show.
        pairs: To write.
        label: What made all samples: `trainer.labels.label_of`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    entries = []
    for number, shown in enumerate(samples):
        name = sample_name(number)
        own = {"prompt": shown.caption, "number": number, "repeat": 0, **label}
        publish_labelled(folder, name, own, {f"{name}.png": png_bytes(shown.picture, own)})
        entries.append({"caption": shown.caption, "picture": f"{name}.png", "ok": shown.ok})
    return publish_gallery(folder, entries, samples[:GRID_PICTURES], pairs, label=label)


def sample_name(number: int, repeat: int = 0) -> str:
    """Name a picture of a prompt: sample_0007, and its next one sample_0007_01."""
    return f"sample_{number:04d}" + (f"_{repeat:02d}" if repeat else "")


def publish_gallery(
    folder: Path,
    entries: Sequence[dict[str, Any]],
    shown: Sequence[Shown],
    pairs: Sequence[Pair],
    *,
    label: Label,
) -> Path:
    """Write what goes with the samples of a folder, remove older ones, and publish the index.

    Args:
        folder: Holds the samples already.
        entries: The index's, of all samples; pictures that no entry names are removed.
        shown: Samples for the grid.
        pairs: To write.
        label: What made all samples.

    Returns:
        The grid's path.
    """
    index: dict[str, list[dict[str, Any]]] = {"samples": list(entries), "reconstructions": []}
    for number, pair in enumerate(pairs):
        names = [f"{kind}_{number:04d}.png" for kind in ("real", "reconstructed")]
        _write(folder / names[0], Image.fromarray(pair.real))
        _write(folder / names[1], Image.fromarray(pair.reconstructed))
        index["reconstructions"].append(
            {"caption": pair.caption, "real": names[0], "reconstructed": names[1]}
        )
    publish_bytes(folder / GRID, png_bytes(np.asarray(grid(shown)), label))
    publish_json(folder / INDEX, index)
    named = [str(name) for group in index.values() for each in group for name in each.values()]
    _remove_others(folder, (Path(name).stem for name in named if name.endswith(".png")))
    return folder / GRID


def _remove_others(folder: Path, kept: Iterable[str]) -> None:
    """Remove pictures of earlier commands, with their labels; nothing that we did not name."""
    stems = set(kept)
    for path in folder.iterdir():
        found = _OURS.fullmatch(path.name)
        if found and found[1] not in stems:
            path.unlink()


def grid(samples: Sequence[Shown]) -> Image.Image:
    """Lay samples out in rows with their captions below, green where right, red where wrong."""
    columns = min(COLUMNS, len(samples))
    rows = -(-len(samples) // columns)
    step_x, step_y = TILE_PX + GAP_PX, TILE_PX + LABEL_PX
    sheet = Image.new("RGB", (columns * step_x + GAP_PX, rows * step_y + GAP_PX), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for number, shown in enumerate(samples):
        x = GAP_PX + number % columns * step_x
        y = GAP_PX + number // columns * step_y
        tile = Image.fromarray(shown.picture).resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)
        sheet.paste(tile, (x, y))
        colour = {True: _RIGHT, False: _WRONG, None: _PLAIN}[shown.ok]
        text = _wrapped(shown.caption, font)
        draw.multiline_text((x, y + TILE_PX + 2), text, fill=colour, font=font, spacing=1)
    return sheet


def reconstructions(sampler: Sampler, count: int) -> list[Pair]:
    """Pass some pictures of a run's dataset through its autoencoder."""
    dataset = place(sampler.cfg.data.dataset)
    side_px = sampler.cfg.encoders.image_side_px
    found = dataset_pictures(dataset, load_manifest(dataset), count, side_px=side_px)
    if not found:
        return []
    captions, pictures = zip(*found, strict=True)
    coded = sampler.reconstruct(np.stack(pictures))
    return [Pair(*each) for each in zip(captions, pictures, coded, strict=True)]


def dataset_pictures(
    dataset: Path, manifest: Manifest, count: int, *, side_px: int
) -> list[tuple[str, Pixels]]:
    """Read (caption, picture) of up to `count` samples, spread evenly over the first shard."""
    entry = manifest.shards[0]
    with Shard(entry.tar(dataset), read_index(entry.index(dataset))) as shard:
        rows = np.linspace(0, entry.count - 1, min(count, entry.count)).astype(int).tolist()
        return [(shard.caption(row), read_picture(shard, row, side_px)) for row in rows]


def read_picture(shard: Shard, row: int, side_px: int, *, as_encoded: bool = False) -> Pixels:
    """Read the picture of a sample as a square, or as the very one that `kiln encode` encodes."""
    extension = next(ext for ext in shard.extensions(row) if ext in _PICTURES)
    name = f"{shard.path}: {shard.keys[row]}.{extension}"
    if as_encoded:
        return cover(decode_bgr(shard.read(row, extension), name=name), side_px, side_px).rgb_HWC
    return decode_square(shard.read(row, extension), side_px, name=name)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Break a text into at most three lines of a tile's width."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= TILE_PX or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > 3:
        lines = [*lines[:2], f"{lines[2]} ..."]
    return "\n".join(lines)


def _write(path: Path, picture: Image.Image) -> None:
    with published(path) as partial:
        picture.save(partial, "PNG")
