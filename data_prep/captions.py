"""Clean captions: entities, addresses, what cannot be seen, and what has no end."""

import html
import re
import unicodedata

from data_prep.config import CaptionsConfig

# Captions of the web are often escaped more than once; a text made of nothing else must end.
_UNESCAPE_PASSES = 3
# html.unescape fails at numbers of more than 4300 digits.
_ENDLESS_NUMBER = re.compile(r"&#\d{100,};?")
_URL = re.compile(r"(?i)\b(?:https?://|www\.)[^\s<>\"']*")
# Control characters become spaces, other invisible ones vanish. The joiners stay: Persian words
# and emoji fall apart without them.
_JOINERS = "\u200c\u200d"
_ASCII_PRINTABLE = re.compile(r"[ -~]*")


def clean_caption(caption: str, cfg: CaptionsConfig) -> str:
    """Clean a caption; what is clean stays as it is.

    Args:
        caption: As the source has it.
        cfg: What is done beyond the removal of control characters, invisible characters and
            repeated white space, and the composition of letters and accents (Unicode's NFC).

    Returns:
        At most `cfg.max_chars` characters; '' if nothing is left.
    """
    text = caption[: 8 * cfg.max_chars]  # what is cut off anyway shall cost nothing
    if cfg.unescape_html:
        text = _unescaped(text)
    if not _ASCII_PRINTABLE.fullmatch(text):
        text = unicodedata.normalize("NFC", "".join(map(_visible, text)))
    if cfg.drop_urls:
        text = _URL.sub(" ", text)
    text = " ".join(text.split()).strip(_JOINERS + " ")  # with nothing beside them they join none
    if len(text) <= cfg.max_chars:
        return text
    cut, space, _ = text[: cfg.max_chars + 1].rpartition(" ")
    return cut if space else text[: cfg.max_chars]


def _unescaped(text: str) -> str:
    for _ in range(_UNESCAPE_PASSES):
        if "&" not in text:
            break
        text = html.unescape(_ENDLESS_NUMBER.sub("\ufffd", text))
    return text


def _visible(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Cc":
        return " "
    return "" if category in {"Cf", "Cs"} and char not in _JOINERS else char
