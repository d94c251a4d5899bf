"""Fetch the rows of one unit with img2dataset's downloader, between our decoder and our spool."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import cv2
import pyarrow as pa

# albumentations, which img2dataset imports, asks the network for a newer version otherwise.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

from img2dataset.downloader import Downloader

from data_prep import guard
from data_prep.config import PrepareConfig
from data_prep.decode import Decoder, Picture

_FACTS = ("width", "height", "original_width", "original_height")


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


class _Entry(NamedTuple):
    """What the spool remembers of a row."""

    status: str
    message: str
    offset: int
    num_bytes: int
    facts: dict[str, Any] | None


class _Spool:
    """Takes the place of img2dataset's writer: one flat file of pictures, everything else noted.

    Rows arrive as their servers answer, and are read back in their own order.
    """

    def __init__(self, path: Path, num_rows: int, on_row: Callable[[bool], None]) -> None:
        self.error: OSError | None = None
        self._on_row = on_row
        self._num_rows = num_rows
        self._entries: dict[int, _Entry] = {}
        self._file = path.open("w+b")
        self._end = 0

    def __call__(self, *_: Any) -> "_Spool":  # noqa: ANN401 - img2dataset's arguments
        return self  # img2dataset makes its writer itself

    def write(self, picture: Picture | None, key: str, _: object, meta: dict[str, Any]) -> None:
        """Take a row from img2dataset."""
        facts: dict[str, Any] | None = None
        offset, size = self._end, 0
        if picture is not None:
            size = len(picture.encoded)
            self._write(picture.encoded)
            facts = {name: meta[name] for name in _FACTS}
            facts |= {"source_sha256": meta["sha256"], "phash": picture.phash}
        message = "" if facts else meta["error_message"] or "no message"
        self._entries[int(key)] = _Entry(meta["status"], message, offset, size, facts)
        self._on_row(facts is not None)

    def _write(self, content: bytes) -> None:
        try:
            self._file.write(content)
        except OSError as error:  # img2dataset would print it and go on
            self.error = self.error or error
            raise
        self._end += len(content)

    def close(self) -> None:
        """Be told by img2dataset that no row follows; the file stays open for reading."""
        try:
            self._file.flush()
        except OSError as error:
            self.error = self.error or error
            raise

    def read_back(self) -> Iterator[Fetched]:
        """Give what became of each row, in order; closes the file."""
        with self._file:
            for number in range(self._num_rows):
                entry = self._entries.get(number)
                if entry is None:  # an error inside img2dataset, which prints it and goes on
                    yield Fetched(status="failed_to_resize", message="lost by img2dataset")
                    continue
                self._file.seek(entry.offset)
                yield Fetched(
                    status=entry.status,
                    message=entry.message,
                    image=self._file.read(entry.num_bytes),
                    facts=entry.facts,
                )


def fetch(
    urls: Sequence[str], folder: Path, cfg: PrepareConfig, on_row: Callable[[bool], None]
) -> Iterator[Fetched]:
    """Download and resize rows; give what became of each, in the order of `urls`.

    The download happens before the first result; the pictures are read back one by one.

    Args:
        urls: Where the pictures are; http and https only.
        folder: An empty folder for intermediate files.
        cfg: The rules.
        on_row: Told, as rows are done, whether a picture came.

    Raises:
        OSError: The intermediate files could not be written, e.g. because the disk is full.
    """
    todo = folder / "rows.arrow"
    table = pa.table({"url": list(urls)})
    with pa.OSFile(str(todo), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)

    spool = _Spool(folder / "pictures", len(urls), on_row)
    downloader = Downloader(
        spool,
        Decoder(cfg),
        cfg.threads,
        save_caption=False,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["url"],
        timeout=cfg.download.timeout_s,
        number_sample_per_shard=max(10, len(urls)),
        oom_shard_count=1,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=cfg.encode_format,
        retries=0,  # the guard tries again, says who asks, and heeds the wishes of owners
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    num_processes = cfg.num_processes * cfg.parts
    with guard.installed(cfg.download, num_processes=num_processes), _Muted() as said:
        succeeded, _ = downloader((0, str(todo)))
    if spool.error is not None:
        raise spool.error
    if not succeeded:
        raise RuntimeError(f"img2dataset gave up: {said.getvalue().strip()}")
    return spool.read_back()


class _Muted:
    """Catches what img2dataset prints, and discards what the C libraries of the decoders print."""

    def __enter__(self) -> io.StringIO:
        said = io.StringIO()
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(said))
            stack.enter_context(contextlib.redirect_stderr(said))
            kept = os.dup(2)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 2)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, nowhere)
            os.dup2(nowhere, 2)
            self._stack = stack.pop_all()
        return said

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def versions() -> dict[str, str]:
    """Name the versions of the tools that shape a stored picture."""
    from importlib.metadata import version  # noqa: PLC0415

    return {
        "img2dataset": version("img2dataset"),
        "opencv": str(cv2.__version__),
        "pillow": version("pillow"),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }
