import json
import shutil
import socket
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep import pictures, sources
from data_prep.config import FaultsConfig, SourceConfig
from data_prep.scenes import is_held_out, parse
from data_prep.sources import choose_faults, free_port
from tests.tiny_source import (
    FAULTY,
    NUM_PICTURES,
    NUM_REDIRECTED,
    make_source,
    source_overrides,
    tree_hashes,
)
from trainer.errors import BadInput
from trainer.frozen import compose

PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "photos"


def rows_of(source):
    return pq.read_table(source / "rows.parquet").to_pylist()


def config(*words):
    return compose(SourceConfig, "source", list(words))


def test_a_painted_source_has_its_rows_pictures_and_faults(source):
    rows = rows_of(source)
    urls = Counter(row["URL"] for row in rows)
    assert len(urls) == NUM_PICTURES
    assert Counter(urls.values())[2] == FAULTY["duplicate"][0]
    faults = json.loads((source / "faults.json").read_text())
    expected = {kind: count for kind, (count, _) in FAULTY.items() if kind != "duplicate"}
    assert Counter(f["kind"] for f in faults.values()) == expected | {"redirect": NUM_REDIRECTED}
    assert {f"/{path.name}" for path in (source / "pictures").iterdir()} >= set(faults)
    assert {path.suffix for path in (source / "pictures").iterdir()} == {".jpg", ".png", ".webp"}


def test_painted_pictures_are_what_the_rows_say_and_never_held_out(source):
    for row in rows_of(source):
        with Image.open(source / "pictures" / row["URL"].rsplit("/", 1)[1]) as image:
            assert image.size == (row["width"], row["height"])
        assert not is_held_out(parse(row["TEXT"]))


def test_the_same_seed_gives_the_same_source_with_any_number_of_processes(source, tmp_path):
    port = json.loads((source / "source.json").read_text())["port"]
    cfg = config(*source_overrides(tmp_path, "processes=2", f"port={port}"))
    sources.run(cfg)
    for path in ("pictures", "faults.json"):
        assert tree_hashes(tmp_path / path) == tree_hashes(source / path)
    assert [row["TEXT"] for row in rows_of(tmp_path)] == [row["TEXT"] for row in rows_of(source)]


def test_again_is_nothing_to_do_and_other_settings_are_refused(tmp_path, capsys):
    cfg = make_source(tmp_path, "num_pictures=3")
    before = tree_hashes(tmp_path)
    sources.run(cfg)
    assert "nothing to do" in capsys.readouterr().out
    assert tree_hashes(tmp_path) == before
    other = source_overrides(tmp_path, "num_pictures=3", "seed=1", f"port={cfg.port}")
    with pytest.raises(BadInput, match=r"other settings \(seed: 0 -> 1\).*out="):
        sources.run(config(*other))


def test_faults_share_no_picture_and_depend_on_names_and_seed_alone():
    names = [f"{i}.jpg" for i in range(200)]
    cfg = config("kind=scenes", "out=x", "faults.slow_frac=0.1").faults
    faults = choose_faults(names, cfg, seed=1)
    assert faults == choose_faults(names[::-1], cfg, seed=1)
    assert faults != choose_faults(names, cfg, seed=2)
    assert all(("seconds" in fault) == (fault["kind"] == "slow") for fault in faults.values())


def test_more_faults_than_pictures_are_refused():
    fracs = {f"{kind}_frac": 0.3 for kind in (*sources.FAULTS, "duplicate")}
    with pytest.raises(BadInput, match=r"add up to 2.1, may be at most 1"):
        choose_faults(["a"], FaultsConfig(**fracs, slow_s=1), seed=0)


def test_a_taken_port_is_replaced_by_a_free_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) != port
    assert free_port(port) == port


def folder_source(root, out):
    cfg = config("kind=folder", f"pictures={root}", f"out={out}", "faults.duplicate_frac=0")
    sources.run(cfg)
    return {row["URL"].rsplit("/", 1)[1]: row["TEXT"] for row in rows_of(out)}


def test_captions_of_a_folder_come_from_the_table_the_sidecar_or_the_name(tmp_path):
    root = tmp_path / "own"
    (root / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.PNG", "a_red-house.webp"):
        Image.new("RGB", (20, 10)).save(root / name)
    (root / "a.txt").write_text("beside it\n")
    (root / "captions.csv").write_text("\ufefffile,caption\nsub/b.PNG,from the table\n")
    texts = folder_source(root, tmp_path / "out")
    assert list(texts.values()) == ["beside it", "a red house", "from the table"]
    assert [name.rpartition(".")[2] for name in texts] == ["jpg", "webp", "png"]
    (root / "captions.csv").write_text("name,text\n")
    with pytest.raises(BadInput, match=r"columns name, text; need file and caption"):
        folder_source(root, tmp_path / "out2")


@pytest.mark.skipif(not PHOTOS.exists(), reason="the shared photographs are not here")
def test_real_photographs_with_a_caption_table_become_a_source(tmp_path):
    cfg = config("kind=folder", f"pictures={PHOTOS}", f"out={tmp_path}", "num_pictures=30")
    sources.run(cfg)
    assert all(row["TEXT"].startswith("a photo of") for row in rows_of(tmp_path))
    assert all(row["width"] > 100 for row in rows_of(tmp_path))


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"kind=folder needs pictures=DIR"):
        sources.run(config("kind=folder", f"out={tmp_path / 'out'}"))
    with pytest.raises(BadInput, match=r"has no .jpg"):
        folder_source(tmp_path, tmp_path / "out")


def test_emoji_without_npm_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match=r"npm is not installed.*apt-get install npm.*kind=scenes"):
        sources.run(config("kind=emoji", f"out={tmp_path / 'out'}"))


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_a_failing_npm_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(RuntimeError, match=r"npm pack @lobehub.* failed"):
        sources.run(config("kind=emoji", f"out={tmp_path / 'out'}"))


def test_emoji_join_pictures_and_labels_by_code(tmp_path):
    base = tmp_path / "npm"
    packages = [base / p.replace("/", "-").strip("@") / "package" for p in pictures._EMOJI_PACKAGES]
    for folder in (packages[0] / "assets", packages[1] / "en", packages[2] / "img/google/64"):
        folder.mkdir(parents=True)
    for name in (
        "assets/1f600.webp",
        "assets/00a9.webp",
        "assets/00a9-fe0f.webp",
        "assets/1f9.webp",
    ):
        Image.new("RGBA", (8, 8)).save(packages[0] / name)
    for name in ("1f600.png", "2764-fe0f.png"):
        Image.new("RGBA", (8, 8)).save(packages[2] / "img/google/64" / name)
    labels = {"1F600": "grinning face", "00A9-FE0F": "copyright", "2764": "red heart"}
    data = [{"hexcode": code, "label": label} for code, label in labels.items()]
    (packages[1] / "en/data.json").write_text(json.dumps(data))
    noto = [{"image": f"{c}.png", "name": "X"} for c in ("1f600", "2764-fe0f", "1f111")]
    (packages[2] / "emoji.json").write_text(json.dumps(noto))
    sources.run(config("kind=emoji", f"out={tmp_path}", "faults.duplicate_frac=0"))
    assert sorted(row["TEXT"] for row in rows_of(tmp_path)) == [
        "copyright, fluent style",
        "grinning face, fluent style",
        "grinning face, noto style",
        "red heart, noto style",
    ]
