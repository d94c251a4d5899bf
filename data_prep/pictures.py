"""Fill a folder with captioned pictures: painted scenes, emoji from npm, or the user's own."""

import csv
import itertools
import json
import os
import shutil
import subprocess  # noqa: TID251 - npm is a program
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.config import SourceConfig
from data_prep.interrupts import sheltered
from data_prep.scenes import caption, draw_scene, paint
from trainer.errors import BadInput, BadWorld
from trainer.observe.countdown import Countdown

FORMATS = ("jpg", "png", "webp")
_SUFFIXES = {".jpg": ".jpg", ".jpeg": ".jpg", ".png": ".png", ".webp": ".webp"}
_EMOJI_PACKAGES = (
    "@lobehub/fluent-emoji-3d@1.1.0",
    "emojibase-data@17.0.0",
    "emoji-datasource-google@16.0.0",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture of a source."""

    name: str
    """Its file in `pictures/`, and the path of its URL."""
    caption: str
    """What it shows."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""


def make_pictures(cfg: SourceConfig, folder: Path) -> list[Picture]:
    """Fill `folder` as `cfg.kind` says; the result is sorted by name."""
    folder.mkdir(parents=True, exist_ok=True)
    match cfg.kind:
        case "scenes":
            return _paint_all(cfg, folder)
        case "emoji":
            return _copy_all(itertools.islice(_emoji(cfg.out / "npm"), cfg.num_pictures), folder)
        case "folder":
            return _copy_all(itertools.islice(_own_pictures(cfg), cfg.num_pictures), folder)


def _paint_all(cfg: SourceConfig, folder: Path) -> list[Picture]:
    num_processes = cfg.processes or len(os.sched_getaffinity(0))
    paint_this = partial(
        _paint_one,
        folder=folder,
        seed=cfg.seed,
        max_side_px=cfg.max_side_px,
        two_things_frac=cfg.two_things_frac,
    )
    numbers = range(cfg.num_pictures)
    with Countdown("painting", cfg.num_pictures) as progress:
        if num_processes == 1:
            return list(_counted(map(paint_this, numbers), progress))
        executor = ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"))
        try:
            with sheltered():
                painted = executor.map(paint_this, numbers, chunksize=16)
            return list(_counted(painted, progress))
        finally:
            executor.shutdown(cancel_futures=True)


def _counted(pictures: Iterable[Picture], progress: Countdown) -> Iterator[Picture]:
    for number, picture in enumerate(pictures, start=1):
        progress.update(number)
        yield picture
    progress.finish()


def _paint_one(
    number: int, *, folder: Path, seed: int, max_side_px: int, two_things_frac: float
) -> Picture:
    scene = draw_scene(number, seed=seed, two_things_frac=two_things_frac)
    width_px, height_px = scene_size(number, max_side_px=max_side_px)
    suffix = FORMATS[number % len(FORMATS)]
    name = f"{number:06d}.{suffix}"
    image = paint(scene, width_px, height_px, jitter_seed=seed * 1_000_003 + number)
    # Colours of small shapes would bleed under chroma subsampling.
    options: dict[str, Any] = {"quality": 92, "subsampling": 0} if suffix == "jpg" else {}
    image.save(folder / name, **options)
    return Picture(name=name, caption=caption(scene), width=width_px, height=height_px)


def scene_size(number: int, *, max_side_px: int) -> tuple[int, int]:
    """Give scene number `number` its width and height in px: mostly small, a few tiny, few large.

    One in 50 is smaller than what a sensible rule keeps, one in 100 has the largest side.
    """
    if number % 50 == 49:
        return 12, 12
    if number % 100 == 7:
        return max_side_px, max_side_px * 3 // 4
    short = min(64 + 16 * (number * 7 % 8), max_side_px)
    long = min(short + 16 * (number * 5 % 4), max_side_px)
    return (long, short) if number % 2 else (short, long)


def _copy_all(found: Iterator[tuple[Path, str, str]], folder: Path) -> list[Picture]:
    """Copy (file, name, caption) into `folder`; pictures that are no pictures come along too."""
    pictures = []
    for path, name, text in found:
        width, height = _copy(path, folder / name)
        pictures.append(Picture(name=name, caption=text, width=width, height=height))
    return sorted(pictures, key=lambda picture: picture.name)


def _copy(path: Path, target: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            size = image.size
    except OSError:  # what it is worth is for `kiln prepare` to say
        size = 0, 0
    shutil.copyfile(path, target)
    return size


def _own_pictures(cfg: SourceConfig) -> Iterator[tuple[Path, str, str]]:
    """Yield (file, name, caption) of a folder of pictures."""
    root = cfg.pictures
    if root is None or not root.is_dir():
        raise BadInput(
            f"kind=folder needs pictures=DIR, a folder of {', '.join(_SUFFIXES)} files with X.txt "
            f"beside X.jpg, or a captions.csv with the columns file and caption; got {root}."
        )
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise BadInput(f"pictures={root} has no {', '.join(_SUFFIXES)} files.")
    table = _captions_csv(root / "captions.csv")
    for number, path in enumerate(files):
        sidecar = path.with_suffix(".txt")
        relative = path.relative_to(root).as_posix()
        if relative in table:
            text = table[relative]
        elif sidecar.exists():
            text = sidecar.read_text(encoding="utf-8", errors="replace").strip()
        else:
            text = path.stem.replace("_", " ").replace("-", " ")
        yield path, f"{number:06d}{_SUFFIXES[path.suffix.lower()]}", text


def _captions_csv(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if not {"file", "caption"} <= set(reader.fieldnames or ()):
            found = ", ".join(reader.fieldnames or ()) or "none"
            raise BadInput(f"{path} has the columns {found}; need file and caption.")
        return {row["file"]: row["caption"].strip() for row in reader}


def _emoji(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield (file, name, caption) of Fluent 3D and Noto emoji without skin tones."""
    fluent, base, noto = (_npm_pack(package, folder) for package in _EMOJI_PACKAGES)
    labels: dict[str, str] = {}
    for emoji in json.loads((base / "en" / "data.json").read_text(encoding="utf-8")):
        labels[_code(emoji["hexcode"])] = emoji["label"]
    seen: set[str] = set()  # some are there under two spellings of their code
    for path in sorted((fluent / "assets").glob("*.webp")):
        code = _code(path.stem)
        if (label := labels.get(code)) and code not in seen:
            seen.add(code)
            yield path, f"fluent-{path.stem}.webp", f"{label}, fluent style"
    rows: list[dict[str, Any]] = json.loads((noto / "emoji.json").read_text(encoding="utf-8"))
    for row in sorted(rows, key=lambda row: str(row["image"])):
        path = noto / "img" / "google" / "64" / row["image"]
        label = labels.get(_code(path.stem)) or str(row["name"]).lower()
        if path.exists():
            yield path, f"noto-{path.stem}.png", f"{label}, noto style"


def _code(text: str) -> str:
    parts = text.lower().replace("_", "-").split("-")
    return "-".join(part for part in parts if part != "fe0f").lstrip("0")


def _npm_pack(package: str, folder: Path) -> Path:
    """Fetch one npm package into `folder`, unless it is there; give its content."""
    target = folder / package.replace("/", "-").strip("@")
    if (target / "package").is_dir():
        return target / "package"
    npm = shutil.which("npm")
    if npm is None:
        raise BadInput(
            "kind=emoji takes its pictures from npm packages, and npm is not installed. Install it "
            "(Debian: apt-get install npm), or use kind=scenes or kind=folder."
        )
    target.mkdir(parents=True, exist_ok=True)
    # npm is the client of that registry; the package's own scripts do not run in a pack.
    done = subprocess.run(  # noqa: S603
        [npm, "pack", package, "--silent", "--pack-destination", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    archives = sorted(target.glob("*.tgz"))
    if done.returncode != 0 or not archives:
        raise BadWorld(f"`npm pack {package}` failed: {done.stderr.strip() or done.stdout.strip()}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(target / "unpacking", filter="data")
    (target / "unpacking" / "package").rename(target / "package")
    archives[0].unlink()
    return target / "package"
