"""Fetch and resize the rows of one unit with img2dataset's own downloader, resizer and writer."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# albumentations, which img2dataset imports, asks the network for a newer version otherwise.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

from img2dataset.downloader import Downloader
from img2dataset.resizer import Resizer
from img2dataset.writer import WebDatasetSampleWriter

from data_prep import guard
from data_prep.bodies import body_problem
from data_prep.config import PrepareConfig
from data_prep.perceptual import phash
from data_prep.policy import policy_denied
from data_prep.quarantine import Reason, marked
from trainer.data.shards import Shard, scan_tar

Resized = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]
_NAME_DIGITS = 5  # img2dataset names its files 00000.tar, 00000.parquet


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What became of one row."""

    status: str
    """'success', 'failed_to_download' or 'failed_to_resize'."""
    message: str
    """img2dataset's error text; empty after success."""
    image: bytes = b""
    """The encoded picture."""
    facts: dict[str, Any] | None = None
    """width, height, original_width, original_height, source_sha256 (of the downloaded bytes),
    phash (of the stored picture)."""


class CheckedResizer(Resizer):  # type: ignore[misc]
    """Resizes like img2dataset, but refuses bodies that are no whole pictures."""

    def __init__(self, cfg: PrepareConfig) -> None:
        super().__init__(
            cfg.image_side_px,
            cfg.resize_mode,
            cfg.resize_only_if_bigger,
            encode_quality=cfg.quality,
            encode_format=cfg.encode_format,
            min_image_size=cfg.min_image_side_px,
            max_aspect_ratio=cfg.max_aspect_ratio,
        )
        self._max_pixels = cfg.max_image_pixels
        self._denied = policy_denied(cfg.policy)

    def __call__(self, img_stream: io.BytesIO, blurring_bbox_list: object = None) -> Resized:
        """Judge, then decode, resize and encode."""
        body = img_stream.getvalue()
        if self._denied is not None and (found := self._denied.find(body)):
            return None, None, None, None, None, marked(Reason.DENIED_CONTENT, found)
        problem = body_problem(body, max_pixels=self._max_pixels)
        if problem is not None:
            return None, None, None, None, None, marked(*problem)
        return super().__call__(img_stream, blurring_bbox_list)  # type: ignore[no-any-return]


class _WatchedWriter:
    """img2dataset's WebDataset writer; counts rows, and keeps the error that the caller hides."""

    def __init__(self, on_row: Callable[[bool], None]) -> None:
        self.error: OSError | None = None
        self._on_row = on_row
        self._writer: Any = None

    def __call__(self, *args: Any) -> "_WatchedWriter":  # noqa: ANN401 - img2dataset's arguments
        with self._remembered():
            self._writer = WebDatasetSampleWriter(*args)
        return self

    def write(self, image: bytes | None, key: str, caption: str, meta: dict[str, Any]) -> None:
        with self._remembered():
            self._writer.write(image, key, caption, meta)
        self._on_row(image is not None)

    def close(self) -> None:
        with self._remembered():
            self._writer.close()

    @contextlib.contextmanager
    def _remembered(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            raise


def fetch(
    urls: Sequence[str],
    captions: Sequence[str],
    folder: Path,
    cfg: PrepareConfig,
    on_row: Callable[[bool], None],
) -> Iterator[Fetched]:
    """Download and resize rows; give what became of each, in the order of `urls`.

    The download happens before the first result; the pictures are read back one by one.

    Args:
        urls: Where the pictures are; http and https only.
        captions: As many.
        folder: An empty folder for the intermediate tar.
        cfg: The rules.
        on_row: Told, as rows are done, whether a picture came.

    Raises:
        OSError: The intermediate files could not be written, e.g. because the disk is full.
    """
    guard.install(cfg.download, num_processes=cfg.num_processes * cfg.parts)
    todo = folder / "rows.arrow"
    table = pa.table({"url": list(urls), "caption": list(captions)})
    with pa.OSFile(str(todo), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)

    watched = _WatchedWriter(on_row)
    downloader = Downloader(
        watched,
        CheckedResizer(cfg),
        cfg.threads,
        save_caption=False,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["url", "caption"],
        timeout=cfg.download.timeout_s,
        number_sample_per_shard=max(10, len(urls)),
        oom_shard_count=_NAME_DIGITS,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=cfg.encode_format,
        retries=0,  # the guard tries again, says who asks, and heeds the wishes of owners
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        succeeded, _ = downloader((0, str(todo)))
    if watched.error is not None:
        raise watched.error
    if not succeeded:
        raise RuntimeError(f"img2dataset gave up: {said.getvalue().strip()}")
    return _read_back(folder, len(urls), cfg.encode_format)


def _read_back(folder: Path, num_rows: int, extension: str) -> Iterator[Fetched]:
    stem = "0" * _NAME_DIGITS
    results = {
        int(row["key"]): row for row in pq.read_table(folder / f"{stem}.parquet").to_pylist()
    }
    with Shard(folder / f"{stem}.tar", scan_tar(folder / f"{stem}.tar")) as shard:
        place = {int(key): row for row, key in enumerate(shard.keys)}
        for number in range(num_rows):
            row = results.get(number)
            if row is None:  # an error inside img2dataset, which prints it and goes on
                yield Fetched(status="failed_to_resize", message="lost by img2dataset")
            elif row["status"] != "success":
                yield Fetched(status=row["status"], message=row["error_message"] or "no message")
            else:
                names = ("width", "height", "original_width", "original_height")
                facts = {name: row[name] for name in names} | {"source_sha256": row["sha256"]}
                image = shard.read(place[number], extension)
                pixels: Any = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB)
                facts["phash"] = phash(pixels)
                yield Fetched(status="success", message="", image=image, facts=facts)


def versions() -> dict[str, str]:
    """Name the versions of the tools that shape a stored picture."""
    from importlib.metadata import version  # noqa: PLC0415

    return {
        "img2dataset": version("img2dataset"),
        "opencv": str(cv2.__version__),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }
