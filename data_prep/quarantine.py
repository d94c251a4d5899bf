"""Why a row was not kept: the closed list of reasons, and one JSON line for each such row."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from trainer.data.publish import publish_bytes
from trainer.errors import BadInput


class Reason(StrEnum):
    """Every reason besides `http_<code>`, the answers that are no picture, and `rule_<key>`.

    REMOVED rows have a URL that was taken down. RETRIED is no end: the row is counted in the unit
    that tries it again.
    """

    MISSING_URL = "missing_url"
    MISSING_CAPTION = "missing_caption"
    MISSING_PICTURE = "missing_picture"
    DUPLICATE = "duplicate"
    SCHEME_REFUSED = "scheme_refused"
    ADDRESS_REFUSED = "address_refused"
    CONNECTION = "connection"
    TIMEOUT = "timeout"
    OPT_OUT = "opt_out"
    TOO_MANY_BYTES = "too_many_bytes"
    TRUNCATED = "truncated"
    NOT_AN_IMAGE = "not_an_image"
    FORMAT_REFUSED = "format_refused"
    ANIMATED = "animated"
    UNDECODABLE = "undecodable"
    TOO_SMALL = "too_small"
    TOO_LARGE = "too_large"
    ASPECT_RATIO = "aspect_ratio"
    BLANK = "blank"
    BAD_RESPONSE = "bad_response"
    TOO_MANY_REDIRECTS = "too_many_redirects"
    REMOVED = "removed"
    LANGUAGES = "rule_languages"
    DENIED_CONTENT = "denied_content"
    SCORE_NSFW = "score_nsfw"
    SCORE_CLIP = "score_clip"
    SCORE_AESTHETIC = "score_aesthetic"
    SCORE_OCR = "score_ocr"
    OTHER = "other"
    RETRIED = "retried"


UNREACHED = frozenset({Reason.CONNECTION, Reason.TIMEOUT, Reason.ADDRESS_REFUSED})
"""Reasons that, when every row of a unit has one, speak of the network and not of the rows."""

SYSTEMIC = frozenset(
    {
        *UNREACHED,
        Reason.BAD_RESPONSE,
        Reason.NOT_AN_IMAGE,  # the page of a network that wants a login, in place of every picture
        Reason.TRUNCATED,
        Reason.UNDECODABLE,
        Reason.OTHER,
        "http_403",
        "http_407",
        "http_429",
        "http_502",
        "http_503",
        "http_504",
        "http_511",
    }
)
"""Reasons that speak of the network or of the tools when nearly every row of a unit has one."""

# img2dataset hands every failure on as text. Ours carry their reason in it; the others are
# recognised by what urllib, http.client and img2dataset 1.47 say.
_MARK = "kiln-reason="
_MARKED = re.compile(rf"{_MARK}({'|'.join(Reason)}): ([^>]*)")
_HTTP = re.compile(r"HTTP Error (\d{3})")
_KNOWN: tuple[tuple[str, Reason], ...] = (
    ("disallowed by X-Robots-Tag", Reason.OPT_OUT),
    ("IncompleteRead", Reason.TRUNCATED),
    ("timed out", Reason.TIMEOUT),
    ("unknown url type", Reason.SCHEME_REFUSED),
    ("urlopen error", Reason.CONNECTION),
    ("Remote end closed connection", Reason.CONNECTION),
    ("Connection reset", Reason.CONNECTION),
)


def marked(reason: Reason, detail: str) -> str:
    """Write a failure so that `reason_of` gets its reason back from within other text."""
    return f"{_MARK}{reason}: {detail}"


def reason_of(status: str, message: str) -> tuple[str, str]:
    """Give the reason and a short detail of a failure as img2dataset reports it.

    Args:
        status: 'failed_to_download' or 'failed_to_resize'.
        message: The text of the exception.
    """
    if found := _MARKED.search(message):
        return str(Reason(found.group(1))), found.group(2)
    if found := _HTTP.search(message):
        return f"http_{found.group(1)}", message
    for words, reason in _KNOWN:
        if words in message:
            return str(reason), message
    fallback = Reason.UNDECODABLE if status == "failed_to_resize" else Reason.OTHER
    return str(fallback), message


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """One row that was not kept."""

    key: str
    """Its stable id."""
    url: str | None
    """As the source has it."""
    stage: str
    """'source' (never fetched), 'download', 'decode', 'score', or 'index' (in a foreign tar)."""
    reason: str
    """A Reason, or http_<code>."""
    detail: str
    """The message behind it."""


def retried(key: str, url: str | None) -> Rejected:
    """Give the line of a row that failed once and is tried again in a later unit."""
    detail = "tried again in a later unit"
    return Rejected(key=key, url=url, stage="download", reason=str(Reason.RETRIED), detail=detail)


def write_quarantine(path: Path, rows: Iterable[Rejected]) -> str:
    """Write one JSON line per row, atomically; return the file's sha256."""
    lines = (json.dumps(asdict(row), sort_keys=True, ensure_ascii=False) for row in rows)
    # Invalid surrogates can be in URLs of the wild; they must not stop the unit.
    return publish_bytes(path, "".join(f"{line}\n" for line in lines).encode(errors="replace"))


def read_quarantine(path: Path) -> Iterator[Rejected]:
    """Read a file that `write_quarantine` wrote."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield Rejected(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise BadInput(
                    f"{path}:{number} is no quarantine record ({error}). Give the `kiln prepare` "
                    "command that made the dataset again, with recheck=hashes."
                ) from error


def count_reasons(rows: Sequence[Rejected]) -> dict[str, int]:
    """Count rows by reason, sorted by name."""
    return dict(sorted(Counter(row.reason for row in rows).items()))
