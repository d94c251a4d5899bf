import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.captions import clean_caption
from data_prep.config import CaptionsConfig


def cfg(**changes):
    return CaptionsConfig(
        **{"unescape_html": True, "drop_urls": True, "max_chars": 4000, **changes}
    )


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("a red bus", "a red bus"),
        ("  a\tred\r\n bus\u00a0 ", "a red bus"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("Tom &amp;amp; Jerry &#39;s", "Tom & Jerry 's"),
        ("cafe\u0301", "caf\u00e9"),
        ("a\u200bb\ufeffc\u00add\u202ee", "abcde"),
        ("a\x00b\x1b[31mc", "a b [31mc"),
        ("see https://x.com/a?b=c for more", "see for more"),
        ("WWW.example.com shop", "shop"),
        ("<a href='http://x.com/Some-Place'>Some Place</a>", "<a href=' '>Some Place</a>"),
        ("http://only.example/x.jpg", ""),
        ("&nbsp;\u200b", ""),
        ("\ud800lone", "lone"),
        ("a &#0000000065; &#" + "9" * 5000 + "; b", "a A \ufffd b"),
        ("&amp;#" + "9" * 5000, "\ufffd"),
        ("\u200d \u200c\u200d", ""),
        ("\u200ca red bus \u200d", "a red bus"),
        ("\u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f680",) * 2,
    ],
)
def test_what_is_cleaned(dirty, clean):
    assert clean_caption(dirty, cfg()) == clean


def test_each_part_can_be_switched_off():
    dirty = "a &amp; b http://x.y/z"
    assert clean_caption(dirty, cfg(unescape_html=False)) == "a &amp; b"
    assert clean_caption(dirty, cfg(drop_urls=False)) == "a & b http://x.y/z"


def test_long_captions_are_cut_between_words():
    assert clean_caption("one two three", cfg(max_chars=9)) == "one two"
    assert clean_caption("one two three", cfg(max_chars=7)) == "one two"
    assert clean_caption("abcdefghij", cfg(max_chars=4)) == "abcd"


@given(st.text(max_size=200), st.integers(1, 60))
def test_the_laws_of_clean_captions(text, max_chars):
    cleaned = clean_caption(text, cfg(max_chars=max_chars))
    assert len(cleaned) <= max_chars
    assert cleaned == " ".join(cleaned.split())
    categories = {unicodedata.category(char) for char in cleaned if char not in "\u200c\u200d"}
    assert not categories & {"Cc", "Cf", "Cs"}
    assert unicodedata.is_normalized("NFC", cleaned)


@given(st.text(max_size=200).filter(lambda text: "&" not in text))
def test_what_is_clean_stays_as_it_is(text):
    once = clean_caption(text, cfg())
    assert clean_caption(once, cfg()) == once


@pytest.mark.parametrize(
    "text", ["x" * 1_000_000, "&amp;" * 200_000, "&" + "amp;" * 250_000, "\u200b" * 10**6]
)
def test_a_megabyte_costs_little(text):
    started_s = time.perf_counter()
    assert len(clean_caption(text, cfg())) <= 4000
    assert time.perf_counter() - started_s < 1
