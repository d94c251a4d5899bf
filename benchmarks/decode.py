"""How fast do pictures become training squares, and how much do they lose by it?"""

import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from benchmarks.harness import (
    Case,
    Claim,
    Row,
    claim_at_least,
    claim_at_most,
    measure,
    write_result,
)
from trainer.data.decode import decode_square

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos"
SIDE_PX = 256
NUM_PICTURES, NUM_JUDGED = 12, 60
"""Whose speed is measured, and whose quality is: that differs more between pictures."""
GRAIN = 3.0
"""Standard deviation of the noise on the enlarged photographs, which had lost theirs."""
SIDES_PX = {
    "JPEG": (400, 512, 640, 1024, 1600),
    "WEBP": (512, 1024),
    "PNG": (512, 1024),
}
OPTIONS: dict[str, dict[str, int]] = {
    "JPEG": {"quality": 90},
    "WEBP": {"quality": 90, "method": 2},
    "PNG": {},
}
REDUCED = (
    (8, cv2.IMREAD_REDUCED_COLOR_8),
    (4, cv2.IMREAD_REDUCED_COLOR_4),
    (2, cv2.IMREAD_REDUCED_COLOR_2),
)
METRICS = (
    ("1 thread, per CPU s", 1, time.process_time),
    ("2 threads, per CPU s", 2, time.process_time),
    ("2 threads", 2, time.perf_counter),
)

Rgb = NDArray[np.uint8]
Decode = Callable[[bytes], Rgb]


def photographs(num_pictures: int) -> list[Image.Image]:
    """Read real photographs, where they lie beside the checkout; else make up some."""
    files = sorted(PHOTOS.glob("*.jpg"))
    if files:
        step = len(files) // num_pictures
        return [Image.open(file).convert("RGB") for file in files[::step][:num_pictures]]
    random = np.random.default_rng(0)
    rough = random.integers(0, 256, (num_pictures, 40, 30, 3), np.uint8)
    return [Image.fromarray(each).resize((400, 533), Image.Resampling.BICUBIC) for each in rough]


def files_of(photos: Sequence[Image.Image], kind: str, shorter_px: int) -> list[bytes]:
    """Enlarge photographs, put grain on them and encode them."""
    random = np.random.default_rng(shorter_px)
    files = []
    for photo in photos:
        scale = shorter_px / min(photo.size)
        size = (round(photo.width * scale), round(photo.height * scale))
        pixels = np.asarray(photo.resize(size, Image.Resampling.LANCZOS)).astype(np.float32)
        pixels += random.normal(0, GRAIN, pixels.shape).astype(np.float32)
        file = io.BytesIO()
        grainy = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
        grainy.save(file, kind, **OPTIONS[kind])
        files.append(file.getvalue())
    return files


def kiln(content: bytes) -> Rgb:
    """Decode as training does."""
    return decode_square(content, SIDE_PX, name="x")


def opencv(content: bytes, flag: int = cv2.IMREAD_COLOR) -> Rgb:
    """Decode, average and crop by OpenCV: Kiln's first way, and that of many loaders."""
    bgr: Rgb | None = cv2.imdecode(np.frombuffer(content, np.uint8), flag)
    assert bgr is not None
    height, width = bgr.shape[:2]
    scale = SIDE_PX / min(width, height)
    if scale < 1:
        size = (round(width * scale), round(height * scale))
        bgr = cv2.resize(bgr, size, interpolation=cv2.INTER_AREA)
    top, left = (bgr.shape[0] - SIDE_PX) // 2, (bgr.shape[1] - SIDE_PX) // 2
    crop = bgr[top : top + SIDE_PX, left : left + SIDE_PX]
    rgb: Rgb = cv2.cvtColor(crop, cv2.COLOR_BGR2RGB)
    return rgb


def opencv_reduced(content: bytes) -> Rgb:
    """Let OpenCV reduce the JPEG while it decodes, to no less than the square."""
    shorter_px = min(Image.open(io.BytesIO(content)).size)
    fits = (flag for n, flag in REDUCED if shorter_px >= n * SIDE_PX)
    return opencv(content, next(fits, cv2.IMREAD_COLOR))


def pillow(
    content: bytes, how: Image.Resampling = Image.Resampling.BICUBIC, *, draft: bool = True
) -> Rgb:
    """Decode by Pillow, JPEGs reduced to no less than the square by its draft mode."""
    picture = Image.open(io.BytesIO(content))
    if draft:
        picture.draft("RGB", (SIDE_PX, SIDE_PX))
    scale = SIDE_PX / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    left, top = (size[0] - SIDE_PX) // 2, (size[1] - SIDE_PX) // 2
    resized = picture.convert("RGB").resize(size, how)
    return np.asarray(resized.crop((left, top, left + SIDE_PX, top + SIDE_PX)))


def pictures_per_s(
    decode: Decode, files: Sequence[bytes], num_threads: int, clock: Callable[[], float]
) -> float:
    """Decode every file once, after one for each thread; give the number per clock second."""
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(decode, files[:num_threads]))
        started_s = clock()
        list(threads.map(decode, files))
        return len(files) / (clock() - started_s)


def psnr_db(decode: Decode, files: Sequence[bytes]) -> float:
    """Compare with the whole decode by Pillow and Lanczos' filter; give the median."""
    return float(np.median([_psnr_db(decode(file), lanczos(file)) for file in files]))


def lanczos(content: bytes) -> Rgb:
    """Decode as well as Pillow can."""
    return pillow(content, Image.Resampling.LANCZOS, draft=False)


def _psnr_db(one: Rgb, other: Rgb) -> float:
    return 10 * float(np.log10(255**2 / np.square(one.astype(float) - other).mean()))


def systems_of(kind: str) -> dict[str, Decode]:
    """Name what decodes a kind."""
    systems: dict[str, Decode] = {"opencv": opencv, "pillow": pillow, "kiln": kiln}
    return systems | ({"opencv, reduced": opencv_reduced} if kind == "JPEG" else {})


def speeds(files: Sequence[bytes], named: Callable[..., Case], kind: str) -> list[Case]:
    """Give the cases of one kind and size."""
    packages = {"opencv": "opencv-python-headless", "pillow": "pillow", "kiln": "simplejpeg"}
    return [
        named(
            system=name,
            metric=metric,
            unit="pictures/s",
            run=partial(pictures_per_s, decode, files, num_threads, clock),
            packages=[packages[name.split(",")[0]]],
        )
        for metric, num_threads, clock in METRICS
        for name, decode in systems_of(kind).items()
    ]


def qualities(files: Sequence[bytes], named: Callable[..., Case], kind: str) -> list[Case]:
    """Give the cases of one kind and size, on squares, of which no rounding shifts a pixel."""
    return [
        named(
            system=name,
            metric="PSNR to Lanczos' filter",
            unit="dB",
            run=partial(psnr_db, decode, files),
        )
        for name, decode in systems_of(kind).items()
    ]


def claims_of(case: str, speed: Sequence[Row], quality: Sequence[Row]) -> list[Claim]:
    """State what the rows of one kind and size show."""
    rates = {(row.system, row.metric): row.median for row in speed}
    found = {row.system: row.median for row in quality}
    ratios = [rates["kiln", metric] / rates["opencv", metric] for metric, _, _ in METRICS[:2]]
    jpeg = case.startswith("JPEG")
    return [
        claim_at_least(
            f"{case}: pictures per CPU s, over those of OpenCV's decode and averaging",
            measured=min(ratios),
            target=1.2 if jpeg else 0.95,
        ),
        claim_at_most(
            f"{case}: dB that Kiln's pictures are worse than those",
            measured=found["opencv"] - found["kiln"],
            target=1.0,
        ),
    ]


def main() -> None:
    """Measure and write the result."""
    cv2.setNumThreads(1)
    photos, judged = photographs(NUM_PICTURES), photographs(NUM_JUDGED)
    squares = [ImageOps.fit(photo, (min(photo.size),) * 2) for photo in judged]
    rows: list[Row] = []
    claims: list[Claim] = []
    for kind, sides_px in SIDES_PX.items():
        for side_px in sides_px:
            case = f"{kind} {side_px} px -> {SIDE_PX} px"
            named = partial(Case, case=case)
            speed = measure(speeds(files_of(photos, kind, side_px), named, kind), repetitions=4)
            quality = measure(
                qualities(files_of(squares, kind, side_px), named, kind), repetitions=1, warmups=0
            )
            rows += [*speed, *quality]
            claims += claims_of(case, speed, quality)
    write_result("decode", question=str(__doc__), rows=rows, claims=claims)


if __name__ == "__main__":
    main()
