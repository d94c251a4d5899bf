"""What is found missing or damaged, and taken back, before commands share the rest."""

import pytest

from data_prep import encode
from data_prep.config import EncodeConfig
from data_prep.due import due_latents, due_rows
from tests import tiny_encoders
from tests.tiny_dataset import scenes_dataset
from tests.tiny_pipeline import contents, flip, made_anew, tars
from tests.tiny_source import prepare_cfg, publish_here
from trainer.data.manifest import list_encodings
from trainer.frozen import compose


def test_damaged_units_of_a_dataset_are_taken_back_and_made_again_and_no_others(served, tmp_path):
    cfg = prepare_cfg(served, tmp_path / "dataset", "shard_rows=10")
    before_all = due_rows(cfg, "hashes")
    assert list(before_all.units) == list(range(before_all.total))
    assert not before_all.is_finished
    publish_here(cfg)
    assert due_rows(cfg, "hashes").is_finished

    before = tars(cfg.dataset)
    flip(cfg.dataset / "shards/00003.tar")
    assert due_rows(cfg, "sizes").is_finished
    due = due_rows(cfg, "hashes")
    assert due.units == [3]
    assert not due.is_finished
    assert not (cfg.dataset / "shards/00003.tar").exists()
    assert due_rows(cfg, "sizes").units == [3]
    publish_here(cfg)
    after = tars(cfg.dataset)
    assert made_anew(before, after) == {"shards/00003.tar"}
    assert contents(after) == contents(before)


def test_a_dataset_without_its_manifest_is_not_finished(served, tmp_path):
    cfg = prepare_cfg(served, tmp_path / "dataset")
    publish_here(cfg)
    (cfg.dataset / "manifest.json").unlink()
    due = due_rows(cfg, "sizes")
    assert not due.units
    assert not due.is_finished


@pytest.fixture
def encoding(tmp_path):
    dataset = scenes_dataset(tmp_path / "scenes", num_shards=4, per_shard=3)
    kl, t5 = tiny_encoders.save_kl(tmp_path / "kl"), tiny_encoders.save_t5(tmp_path / "t5")
    words = [
        f"dataset={dataset}",
        "text=t5_base",
        f"encoders.autoencoder.path={kl}",
        f"encoders.text.path={t5}",
        "encoders.image_side_px=16",
        "probe_s=0",
        "wandb=off",
    ]
    return compose(EncodeConfig, "encode", words)


def test_damaged_sidecars_are_taken_back_and_made_again_and_no_others(encoding):
    assert list(due_latents(encoding, "hashes").units) == [0, 1, 2, 3]
    assert encode.run(encoding) == 0
    assert due_latents(encoding, "hashes").is_finished

    before = tars(encoding.dataset)
    (name,) = (each for each in before if each.endswith("/00002.tar") and "encodings" in each)
    flip(encoding.dataset / name)
    assert due_latents(encoding, "sizes").is_finished
    due = due_latents(encoding, "hashes")
    assert (due.units, due.total, due.is_finished) == ([2], 4, False)
    assert not (encoding.dataset / name).exists()
    # What lists the damaged shard is gone with it.
    assert list_encodings(encoding.dataset) == []
    assert encode.run(encoding) == 0
    after = tars(encoding.dataset)
    assert made_anew(before, after) == {name}
    assert contents(after) == contents(before)


def test_an_encoding_without_its_list_is_not_finished(encoding):
    assert encode.run(encoding) == 0
    (path,) = encoding.dataset.glob("encodings/*/encoding.json")
    path.unlink()
    due = due_latents(encoding, "hashes")
    assert not due.units
    assert not due.is_finished
