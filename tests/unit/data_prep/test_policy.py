import hashlib
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep.config_policy import PolicyConfig
from data_prep.policy import (
    broken_rule_sql,
    check_safety,
    load_lists,
    load_policy,
    make_rules,
    plain_policy,
    unheeded_rules,
)
from data_prep.rows import connect, rows_sql
from tests.tiny_source import prepare_cfg
from trainer.errors import BadInput
from trainer.frozen import read_yaml, thaw, write_yaml

GOOD = {"URL": "http://img.example.co.uk/a.jpg", "TEXT": "a good caption"}


def judge(policy, tmp_path, *rows):
    """The reason for each row, None for a good one."""
    names = dict.fromkeys(name for row in rows for name in {**GOOD, **row})
    source = pa.table({n: [{**GOOD, **row}.get(n) for row in rows] for n in names})
    cfg = prepare_cfg(tmp_path, tmp_path)
    with connect(tmp_path / "spill", memory_gb=0.1, threads=1) as connection:
        connection.register("source", source)
        load_lists(connection, policy)
        rule = broken_rule_sql(make_rules(policy, source.column_names))
        query = rows_sql(cfg.columns, source.column_names, rule)
        return [row[0] for row in connection.execute(f"SELECT reason FROM ({query})").fetchall()]


def file_of(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def with_lists(tmp_path, **changes):
    path = tmp_path / "policy.yaml"
    write_yaml(plain_policy(**changes).cfg, path)
    return load_policy(str(path))


@pytest.mark.parametrize(
    ("rule", "column", "bad", "edge"),
    [
        ({"min_similarity": 0.3}, "similarity", 0.29, 0.3),
        ({"max_punsafe": 0.5}, "punsafe", 0.51, 0.5),
        ({"max_pwatermark": 0.8}, "PWATERMARK", 0.81, "0.8"),
        ({"min_aesthetic_score": 5}, "AESTHETIC_SCORE", 4.9, 5),
        ({"licences": ["cc0"]}, "LICENSE", "?", "CC0"),
        ({"languages": ["en", "de"]}, "LANGUAGE", "fr", "de"),
        ({"min_caption_chars": 5}, "TEXT", "four", "fives"),
        ({"max_caption_chars": 5}, "TEXT", "sixsix", "fives"),
        ({"min_caption_words": 3}, "TEXT", "two words", "now  three words"),
        ({"top_level_domains": ["de"]}, "URL", "http://a.fr/x", "http://a.de:80/x.fr"),
        ({"denied_top_level_domains": ["cn"]}, "URL", "https://A.CN/x", "http://cn.com/x"),
        ({"hosts": ["b.org"]}, "URL", "http://xb.org/", "http://img.b.org/x"),
        ({"denied_hosts": ["b.co.uk"]}, "URL", "http://me@a.b.co.uk:1/", "http://c.co.uk/b.co.uk"),
    ],
)
def test_a_rule_rejects_beyond_its_limit_and_only_there(tmp_path, rule, column, bad, edge):
    rows = [{column: bad}, {column: edge}]
    if isinstance(edge, str):
        rows = [{column: str(value)} for row in rows for value in row.values()]
    found = judge(plain_policy(**rule), tmp_path, *rows)
    assert found[1] is None
    assert found[0].removeprefix("rule_") in {next(iter(rule)), "denied_host", "host"} | {
        "top_level_domain"
    }


def test_sides_are_judged_together(tmp_path):
    policy = plain_policy(min_side_px=100, max_pixels=10**6, max_aspect_ratio=3)
    sizes = [(100, 300), (99, 500), (1001, 1000), (100, 301), (301, 100), (None, 5), (0, 0)]
    found = judge(policy, tmp_path, *({"WIDTH": w, "height": h} for w, h in sizes))
    assert found == [
        None,
        "rule_min_side_px",
        "rule_max_pixels",
        "rule_max_aspect_ratio",
        "rule_max_aspect_ratio",
        None,
        "rule_min_side_px",
    ]


@pytest.mark.parametrize(("missing", "reason"), [("keep", None), ("reject", "rule_max_punsafe")])
def test_a_value_that_is_missing_is_treated_as_the_policy_says(tmp_path, missing, reason):
    policy = plain_policy(max_punsafe=0.5, missing=missing)
    values = [None, "unknown", "nan", "0.1"]
    found = judge(policy, tmp_path, *({"punsafe": value} for value in values))
    assert found == [reason, reason, reason, None]


def test_a_rule_without_its_column_is_said_or_refused():
    rules = make_rules(plain_policy(max_punsafe=0.5), ["URL", "TEXT"])
    assert unheeded_rules(rules) == ["max_punsafe"]
    with pytest.raises(BadInput, match=r"max_punsafe needs the column punsafe.*missing: keep"):
        make_rules(plain_policy(max_punsafe=0.5, missing="reject"), ["URL", "TEXT"])


def test_lists_are_read_from_files(tmp_path):
    policy = with_lists(
        tmp_path,
        denied_urls_file=file_of(tmp_path / "urls", "# taken down", "http://x.org/Bad.jpg"),
        denied_hosts_file=file_of(tmp_path / "hosts", "EVIL.com"),
        denied_hashes_file=file_of(
            tmp_path / "hashes", "12345", hashlib.md5(b"http://x.org/md5").hexdigest()
        ),
    )
    rows = [
        {"URL": "http://x.org/Bad.jpg"},
        {"URL": "http://x.org/bad.jpg"},
        {"URL": "http://www.evil.com/a"},
        {"URL": "http://x.org/md5"},
        {"hash": 12345},
        {"hash": 5},
    ]
    assert judge(policy, tmp_path, *rows) == [
        "rule_denied_url",
        None,
        "rule_denied_host",
        "rule_denied_hash",
        "rule_denied_hash",
        None,
    ]


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.com./x",
        "http://evil.com.:80/x",
        "http://EVIL.com?x",
        "http://me:word@img.evil.com#x",
        "http://\u24d4vil.com/x",
        "http://evil\u3002com\u3002/x",
        "http://ev\til.com/x",
        "http://good.org\\@evil.com/x",
        "http://b\u00fccher.de/x",
        "http://xn--bcher-kva.de/x",
        "http://a.\u4e2d\u56fd/x",
        "http://a.xn--fiqs8s./x",
    ],
)
def test_no_spelling_of_a_host_gets_past_its_rule(tmp_path, url):
    policy = plain_policy(
        denied_hosts=["evil.com", "B\u00fccher.de"], denied_top_level_domains=[".\u4e2d\u56fd"]
    )
    found = judge(policy, tmp_path, {"URL": url}, {"URL": "http://evil.com.org/evil.com"})
    assert found[0] in {"rule_denied_host", "rule_top_level_domain"}
    assert found[1] is None


def test_a_host_in_a_list_that_is_none_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"policy: '\u3002' is no name of a host"):
        judge(plain_policy(hosts=["\u3002"]), tmp_path, GOOD)


@pytest.mark.parametrize(("missing", "reason"), [("keep", None), ("reject", "rule_licences")])
def test_an_empty_text_is_a_missing_value(tmp_path, missing, reason):
    policy = plain_policy(licences=["cc0"], missing=missing)
    assert judge(policy, tmp_path, {"LICENSE": ""}, {"LICENSE": " "}) == [reason] * 2
    policy = plain_policy(languages=["en"], missing=missing)
    assert judge(policy, tmp_path, {"LANGUAGE": ""}) == [None]  # detected later


def test_a_list_of_urls_to_keep_keeps_these_and_an_empty_one_none(tmp_path):
    good, other = {"URL": "http://x.org/Good.jpg"}, {"URL": "http://x.org/good.jpg"}
    policy = with_lists(tmp_path, urls_file=file_of(tmp_path / "urls", good["URL"]))
    assert judge(policy, tmp_path, good, other) == [None, "rule_url"]
    policy = with_lists(tmp_path, urls_file=file_of(tmp_path / "urls", "# nothing"))
    assert judge(policy, tmp_path, good) == ["rule_url"]


def test_the_hash_of_a_policy_is_that_of_its_content(tmp_path):
    def policy(*lines, name="a"):
        path = file_of(tmp_path / name, *lines)
        return with_lists(tmp_path, denied_urls_file=path)

    same = policy("http://a", "http://b").sha256
    assert policy("http://b", "http://a", "", name="c").sha256 == same
    assert policy("http://b").sha256 != same
    assert plain_policy(min_side_px=3).sha256 != plain_policy().sha256


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["/x/laion2B-en-part-0.parquet"], ["URL", "TEXT"]),
        (["/x/part-0.parquet"], ["URL", "TEXT", "NSFW", "LICENSE"]),
        (["/x/part-0.parquet"], ["URL", "TEXT", "punsafe", "pwatermark"]),
    ],
)
def test_plain_laion_metadata_is_refused_until_someone_says_why_it_is_safe(names, columns):
    with pytest.raises(BadInput, match=r"looks like LAION metadata.*policy=relaion.*not_laion"):
        check_safety(plain_policy(), names, columns)
    check_safety(plain_policy(safety="not_laion"), names, columns)
    check_safety(load_policy("relaion"), names, columns)


def test_own_metadata_is_not_taken_for_laion():
    check_safety(plain_policy(), ["/laion/rows.parquet"], ["URL", "TEXT", "width", "punsafe"])


def test_a_denylist_that_is_promised_must_be_there(tmp_path):
    with pytest.raises(BadInput, match=r"safety=denylist, but neither denied_urls_file"):
        plain_policy(safety="denylist")
    with pytest.raises(BadInput, match=r"denied_urls_file=.*none cannot be read"):
        with_lists(tmp_path, safety="denylist", denied_urls_file=str(tmp_path / "none"))


def test_a_policy_that_is_not_there_names_the_shipped_ones(tmp_path):
    with pytest.raises(BadInput, match=r"neither a file nor a shipped policy \(plain, relaion\)"):
        load_policy("strict")


def test_shipped_policies_say_every_key():
    for path in Path(str(files("conf") / "policies")).glob("*.yaml"):
        cfg = read_yaml(PolicyConfig, path)
        assert set(thaw(cfg)) == set(PolicyConfig.__pydantic_fields__)
