import json
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from data_prep import remove
from data_prep.config import VerifyConfig
from data_prep.config_curate import DedupConfig, RemoveConfig
from data_prep.dedup import run as dedup
from data_prep.plan import plan_path
from data_prep.prepare import run as prepare
from data_prep.publish import quarantine_path
from data_prep.quarantine import read_quarantine
from data_prep.remove import run
from data_prep.verify import run as verify
from tests.curated_dataset import dataset_of, sample
from tests.tiny_source import prepare_cfg, publish_here, tree_hashes, write_rows
from trainer.data.manifest import load_manifest
from trainer.data.shards import read_index
from trainer.data.tombstones import read_tombstones, removed_urls
from trainer.errors import BadInput
from trainer.frozen import compose


@pytest.fixture(scope="module")
def published(served, tmp_path_factory):
    """The tiny source, published in this process, with its config."""
    cfg = prepare_cfg(served, tmp_path_factory.mktemp("published") / "d")
    publish_here(cfg)
    return cfg


@pytest.fixture
def dataset(published, tmp_path):
    return shutil.copytree(published.dataset, tmp_path / "d")


def config(dataset, *words):
    return compose(RemoveConfig, "remove", [f"dataset={dataset}", "why=a request", *words])


def index(dataset, number=0):
    return read_index(dataset / "index" / f"{number:05d}.parquet")


def url_of(dataset, key):
    plan = pq.read_table(plan_path(dataset, 0))
    urls = dict(zip(plan["key"].to_pylist(), plan["url"].to_pylist(), strict=True))
    return urls[int(key, 16)]


def dead(dataset):
    return {f"{key:016x}" for key in read_tombstones(dataset)["key"].to_pylist()}


def test_what_is_asked_by_key_url_and_hash_goes_and_the_rest_stays(dataset, tmp_path, capsys):
    before, tars = load_manifest(dataset), tree_hashes(dataset / "shards")
    keys = index(dataset)["key"].to_pylist()
    other = index(dataset, 1)
    asked = [keys[0], url_of(dataset, keys[1]), other["image_sha256"][0].as_py()]
    (tmp_path / "list.txt").write_text("# a request\n" + "\n".join(asked) + "\n")
    proof = tmp_path / "proof.json"
    assert run(config(dataset, f"file={tmp_path / 'list.txt'}", f"proof={proof}")) == 0
    assert "3 removed now" in capsys.readouterr().out

    after = load_manifest(dataset)
    assert dead(dataset) == {keys[0], keys[1], other["key"][0].as_py()}
    assert set(removed_urls(dataset)) == {url_of(dataset, key) for key in dead(dataset)}
    assert after.rows_removed == 3
    assert (before.removal_version, after.removal_version) == (0, 1)
    assert [some.removed for some in after.weights.values()] == [{1: 2}, {1: 1}]
    assert after.rows_in == after.rows_kept + after.rows_rejected
    assert tree_hashes(dataset / "shards") == tars
    assert verify(VerifyConfig(dataset=dataset)) == 0

    said = json.loads(proof.read_text())
    assert said["fingerprint_before"] == before.fingerprint != after.fingerprint
    assert said["fingerprint_after"] == after.fingerprint
    assert said["removal_version"] == 1
    for line in said["samples"]:
        table = read_index(dataset / "index" / f"{line['shard'][7:12]}.parquet")
        assert table["key"][line["row"]].as_py() == line["key"]
        assert line["url"] == url_of(dataset, line["key"])
    assert {value for line in said["samples"] for value in line["asked"]} == set(asked)

    whole = tree_hashes(dataset)
    assert run(config(dataset, f"file={tmp_path / 'list.txt'}")) == 0
    assert "3 removed before; the fingerprint stays" in capsys.readouterr().out
    assert tree_hashes(dataset) == whole


def test_what_is_not_there_is_named_and_the_rest_goes_all_the_same(dataset, capsys):
    key = index(dataset)["key"][0].as_py()
    words = ("urls=['https://nowhere.example/x.jpg']", f"sha256=[{'0' * 64}]")
    assert run(config(dataset, f"keys=[{key},{'0' * 16}]", *words)) == 1
    said = capsys.readouterr().out
    assert "not found: url https://nowhere.example/x.jpg" in said
    assert f"not found: key {'0' * 16}\n" in said
    assert f"not found: sha256 {'0' * 64}" in said
    assert dead(dataset) == {key}


def test_a_dry_run_changes_nothing(dataset, capsys):
    before = tree_hashes(dataset)
    assert run(config(dataset, f"keys=[{index(dataset)['key'][0].as_py()}]", "dry_run=true")) == 0
    assert "dry run: nothing was changed" in capsys.readouterr().out
    assert tree_hashes(dataset) == before


def test_a_row_that_was_not_stored_is_found_in_the_plan_and_stays_out(dataset, capsys):
    row = next(read_quarantine(quarantine_path(dataset, "00000")))
    before = load_manifest(dataset)
    assert run(config(dataset, f"urls=['{row.url}']")) == 0
    assert "1 not stored, and will not be; the fingerprint stays" in capsys.readouterr().out
    assert dead(dataset) == {row.key}
    assert load_manifest(dataset).fingerprint == before.fingerprint
    assert load_manifest(dataset).removal_version == 0
    assert verify(VerifyConfig(dataset=dataset)) == 0


def test_the_hash_of_the_downloaded_file_and_urls_without_a_plan_are_found_in_the_jsons(tmp_path):
    dataset = dataset_of(tmp_path / "d", [sample(1), sample(2)], [sample(3)])
    url = "https://example.com/3-95-96.jpg"
    assert run(config(dataset, f"sha256=[{2:064x}]", f"urls=['{url}']")) == 0
    assert dead(dataset) == {sample(2).key, sample(3).key}


def test_the_page_of_duplicates_does_not_outlive_its_pictures(tmp_path):
    dataset = dataset_of(tmp_path / "d", [sample(1), sample(1, "again")])
    assert dedup(compose(DedupConfig, "dedup", [f"dataset={dataset}"])) == 0
    assert (dataset / "dedup.html").exists()
    assert run(config(dataset, f"keys=[{sample(1).key}]")) == 0
    assert not (dataset / "dedup.html").exists()
    # What dedup removed may come back by its URL; what was taken down may not.
    assert removed_urls(dataset) == ["https://example.com/1-95-96.jpg"]


def versions(dataset):
    table = read_tombstones(dataset)
    return {
        f"{key:016x}": version
        for key, version in zip(table["key"].to_pylist(), table["version"].to_pylist(), strict=True)
    }


def test_each_removal_of_live_samples_raises_the_version_and_the_first_stays(dataset):
    first, second, third = index(dataset)["key"].to_pylist()[:3]
    row = next(read_quarantine(quarantine_path(dataset, "00000")))
    for asked, version in (([first], 1), ([first], 1), ([first, second], 2), ([row.key], 2)):
        assert run(config(dataset, f"keys=[{','.join(asked)}]")) == 0
        assert load_manifest(dataset).removal_version == version
    assert run(config(dataset, f"urls=['{url_of(dataset, third)}']", f"keys=[{row.key}]")) == 0
    assert versions(dataset) == {first: 1, second: 2, row.key: 2, third: 3}
    manifest = load_manifest(dataset)
    assert manifest.weights["00000"].removed == {1: 1, 2: 1, 3: 1}
    live = [manifest.rows_live_at(version) for version in range(4)]
    assert live == [manifest.rows_kept - gone for gone in range(4)]
    lines = [json.loads(line) for line in (dataset / "history.jsonl").read_text().splitlines()]
    assert [line["removal_version"] for line in lines] == [0, 1, 2, 3]
    assert verify(VerifyConfig(dataset=dataset)) == 0


@pytest.mark.parametrize("step", ["add_tombstones", "weigh", "save_state"])
@pytest.mark.parametrize("done", [False, True])
def test_a_removal_that_was_cut_short_is_finished_by_the_same_command(
    dataset, tmp_path, monkeypatch, step, done
):
    whole = shutil.copytree(dataset, tmp_path / "whole")
    first, second = index(dataset)["key"].to_pylist()[:2]
    for folder in (dataset, whole):
        assert run(config(folder, f"keys=[{first}]")) == 0
    words = (f"keys=[{first},{second}]",)
    assert run(config(whole, *words)) == 0
    real = getattr(remove, step)

    def killed(*given, **named):
        if done:
            real(*given, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(remove, step, killed)
        with pytest.raises(KeyboardInterrupt):
            run(config(dataset, *words))
    assert run(config(dataset, *words)) == 0
    assert load_manifest(dataset).removal_version == 2
    assert tree_hashes(dataset) == tree_hashes(whole)
    assert verify(VerifyConfig(dataset=dataset)) == 0


def test_what_comes_after_a_removal_that_was_cut_short_finishes_it(published, dataset, monkeypatch):
    first, second = index(dataset)["key"].to_pylist()[:2]

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(remove, "weigh", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config(dataset, f"keys=[{first}]"))
    assert load_manifest(dataset).rows_removed == 0
    assert prepare(replace(published, dataset=dataset)) == 0
    assert load_manifest(dataset).weights["00000"].removed == {1: 1}
    assert run(config(dataset, f"keys=[{second}]")) == 0
    assert load_manifest(dataset).weights["00000"].removed == {1: 1, 2: 1}
    assert verify(VerifyConfig(dataset=dataset)) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nothing is to be removed"),
        (["keys=[xyz]"], "key=xyz is none: need 16 hex digits"),
        (["sha256=[0123]"], "sha256=0123 is none: need 64 hex digits"),
        (["file=nowhere.txt"], "file=nowhere.txt cannot be read"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused(dataset, words, says):
    with pytest.raises(BadInput, match=says):
        run(config(dataset, *words))


def test_a_line_that_is_none_of_the_kinds_is_named(dataset, tmp_path):
    (tmp_path / "list.txt").write_text("# list\nhello\n")
    with pytest.raises(BadInput, match=r"list\.txt:2 is neither a key .* nor a URL: hello"):
        run(config(dataset, f"file={tmp_path / 'list.txt'}"))


def test_more_rows_keep_the_tars_and_the_tombstones_and_bring_nothing_back(
    served, tmp_path, capsys
):
    dataset = tmp_path / "d"
    urls = pq.read_table(served / "rows.parquet")["URL"].to_pylist()[:40]
    rows = write_rows(tmp_path / "rows.parquet", *[(url, "first") for url in urls])
    assert prepare(prepare_cfg(served, dataset, f"rows={rows}")) == 0
    key = index(dataset)["key"][0].as_py()
    url = url_of(dataset, key)
    assert run(config(dataset, f"urls=['{url}']")) == 0
    old, tars = load_manifest(dataset), tree_hashes(dataset / "shards")

    pairs = [(url, caption) for caption in ("first", "second") for url in urls]
    write_rows(tmp_path / "rows.parquet", *pairs)
    assert prepare(prepare_cfg(served, dataset, f"rows={rows}")) == 0
    new = load_manifest(dataset)
    assert new.shards[: len(old.shards)] == old.shards
    assert tree_hashes(dataset / "shards").items() > tars.items()
    assert new.rows_removed == old.rows_removed == urls.count(url)
    assert new.rejected["removed"] == 1
    assert (new.removal_version, new.weights) == (1, old.weights)
    assert new.rows_in == new.rows_kept + new.rows_rejected
    assert new.tombstones_sha256 == old.tombstones_sha256
    lines = [json.loads(line) for line in (dataset / "history.jsonl").read_text().splitlines()]
    assert [line["parent"] for line in lines] == [
        None,
        *(line["fingerprint"] for line in lines[:-1]),
    ]
    assert lines[-1]["fingerprint"] == new.fingerprint
    assert verify(VerifyConfig(dataset=dataset)) == 0

    # A unit that is made again does not fetch what was taken down.
    (dataset / "units" / "00000.json").unlink()
    assert prepare(prepare_cfg(served, dataset, f"rows={rows}")) == 0
    again = load_manifest(dataset)
    assert key not in index(dataset)["key"].to_pylist()
    assert again.rejected["removed"] == 2
    assert again.rows_live == new.rows_live
    assert again.removal_version == 1
    assert verify(VerifyConfig(dataset=dataset)) == 0
    with pytest.raises(BadInput, match="rows with removed are never tried again"):
        prepare(prepare_cfg(served, dataset, f"rows={rows}", "retry=[removed]"))


def test_verify_names_tombstones_and_weights_that_do_not_fit(dataset, capsys):
    assert run(config(dataset, f"keys=[{index(dataset)['key'][0].as_py()}]")) == 0
    (tombstones,) = dataset.glob("tombstones.parquet")
    content = tombstones.read_bytes()
    tombstones.unlink()
    assert verify(VerifyConfig(dataset=dataset)) == 1
    said = capsys.readouterr().out
    assert "tombstones.parquet has sha256 None, the manifest says" in said
    assert "00000.npy is not what tombstones.parquet and weights.parquet say" in said
    tombstones.write_bytes(content[:-1])
    assert verify(VerifyConfig(dataset=dataset)) == 1
    assert "no readable parquet" in capsys.readouterr().out
    tombstones.write_bytes(content)
    path = dataset / "manifest.json"
    manifest = path.read_text()
    other = json.loads(manifest) | {"removal_version": 2}
    other["weights"]["00000"]["removed"] = {"2": 1}
    path.write_text(json.dumps(other))
    assert verify(VerifyConfig(dataset=dataset)) == 1
    said = capsys.readouterr().out
    assert "manifest.json has removal version 2, tombstones.parquet has 1" in said
    assert "manifest.json counts other removals in shard 00000 than" in said
    path.write_text(manifest)
    (dataset / "weights" / "00000.npy").write_bytes(b"")
    assert verify(VerifyConfig(dataset=dataset)) == 1
    assert "00000.npy is not what the manifest said" in capsys.readouterr().out


def test_a_proof_that_cannot_be_written_undoes_nothing_and_can_be_had_again(dataset, tmp_path):
    key = index(dataset)["key"][0].as_py()
    with pytest.raises(BadInput, match=r"proof=.*cannot be written .*another proof="):
        run(config(dataset, f"keys=[{key}]", "proof=/proc/proof.json"))
    assert run(config(dataset, f"keys=[{key}]", f"proof={tmp_path / 'proof.json'}")) == 0
    (sample,) = json.loads((tmp_path / "proof.json").read_text())["samples"]
    assert sample["state"] == "removed before"
