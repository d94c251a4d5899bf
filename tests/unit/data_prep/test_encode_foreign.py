"""Encoding what Kiln did not make itself: broken weights, foreign tars, damaged files."""

import json
import shutil
from io import BytesIO

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from data_prep import encode, verify
from data_prep.config import EncodeConfig, VerifyConfig
from data_prep.encode_batches import require_finite_states
from tests import tiny_encoders
from tests.tiny_dataset import publish, sample, scenes_dataset
from trainer.data.manifest import (
    Manifest,
    encoding_folder,
    list_encodings,
    save_manifest,
)
from trainer.data.null_text import NULL_TEXT, read_null_text
from trainer.data.opening import Dataset, Layout, make_law
from trainer.data.shards import Shard, read_index
from trainer.errors import BadInput
from trainer.frozen import compose, freeze, thaw


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return tiny_encoders.save_kl(folder / "kl"), tiny_encoders.save_t5(folder / "t5")


def config(dataset, folders, side_px=16, **changes):
    kl, t5 = folders
    words = (
        f"dataset={dataset} text=t5_base encoders.autoencoder.path={kl} encoders.text.path={t5} "
        f"encoders.image_side_px={side_px} batch_images=4 batch_tokens=32 threads=1 "
        "decode_threads=1 probe_s=0 wandb=off"
    )
    return freeze(EncodeConfig, thaw(compose(EncodeConfig, "encode", words.split())) | changes)


def rows_of(dataset):
    """Key -> index row and text states of the only encoding."""
    (encoding,) = list_encodings(dataset)
    folder = encoding_folder(dataset, encoding.fingerprint)
    found = {}
    for entry in encoding.shards:
        index = read_index(entry.index(folder))
        with Shard(entry.tar(folder), index) as shard:
            for row, facts in enumerate(index.to_pylist()):
                found[facts["key"]] = facts, shard.read(row, "text.npy")
    return found


def foreign(index, **members):
    given = sample(index)
    return given._replace(members={**given.members, **members})


def broken_t5(folder, target, name, value):
    t5 = shutil.copytree(folder, target)
    weights = load_file(t5 / "model.safetensors")
    weights[name].fill_(value)
    save_file(weights, t5 / "model.safetensors", metadata={"format": "pt"})
    return t5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_text_states_that_are_not_finite_are_refused(tmp_path, encoders, value):
    t5 = broken_t5(encoders[1], tmp_path / "t5", "encoder.final_layer_norm.weight", value)
    dataset = scenes_dataset(tmp_path / "data", num_shards=1, per_shard=2)
    with pytest.raises(BadInput, match="states that are not finite for the caption ''"):
        encode.run(config(dataset, (encoders[0], t5)))
    assert not list(dataset.glob("encodings/*/*"))


def test_a_caption_whose_states_are_not_finite_is_named(tmp_path, encoders):
    """Only the word 'star' is broken: the empty caption and the first one are well."""
    t5 = shutil.copytree(encoders[1], tmp_path / "t5")
    weights = load_file(t5 / "model.safetensors")
    weights["shared.weight"][4 + tiny_encoders.WORDS.index("star")] = float("nan")
    save_file(weights, t5 / "model.safetensors", metadata={"format": "pt"})
    samples = [sample(0, text="a circle"), sample(1, text="a star")]
    dataset = publish(tmp_path / "data", [samples])
    with pytest.raises(BadInput, match="not finite for the caption 'a star'"):
        encode.run(config(dataset, (encoders[0], t5)))
    assert list_encodings(dataset) == []


def test_states_too_large_for_fp16_are_clamped(tmp_path, encoders):
    t5 = broken_t5(encoders[1], tmp_path / "t5", "encoder.final_layer_norm.weight", 1e7)
    dataset = scenes_dataset(tmp_path / "data", num_shards=1, per_shard=2)
    encode.run(config(dataset, (encoders[0], t5)))
    for _, text in rows_of(dataset).values():
        states_LD = np.load(BytesIO(text), allow_pickle=False)
        assert np.isfinite(states_LD).all()
        assert np.abs(states_LD).max() == 65504


def test_long_captions_are_not_quoted_in_full():
    with pytest.raises(BadInput) as caught:
        require_finite_states(np.full((1, 2), np.nan, np.float16), "x" * 10**6)
    assert len(str(caught.value)) < 300


def test_captions_that_are_no_utf8_are_encoded(tmp_path, encoders):
    bad, good = (
        foreign(0, txt=b"a circle \xff\xfe"),
        foreign(1, txt="a circle \ufffd\ufffd".encode()),
    )
    dataset = publish(tmp_path / "data", [[bad, good]])
    assert encode.run(config(dataset, encoders, probe_s=0.01)) == 0
    texts = rows_of(dataset)
    assert texts[bad.key][1] == texts[good.key][1]


def test_a_sample_without_a_caption_is_named(tmp_path, encoders):
    bare = sample(0)
    bare = bare._replace(members={"png": bare.members["png"]})
    dataset = publish(tmp_path / "data", [[bare, sample(1)]])
    with pytest.raises(BadInput, match=f"00000.tar: {bare.key} has no caption: need a .txt"):
        encode.run(config(dataset, encoders))


def test_a_picture_of_no_bytes_is_named(tmp_path, encoders):
    empty = foreign(0, png=b"")
    dataset = publish(tmp_path / "data", [[empty]])
    with pytest.raises(BadInput, match=f"{empty.key}.png does not decode"):
        encode.run(config(dataset, encoders))


@pytest.mark.parametrize(
    "about",
    [
        b"\xff no json",
        b"[1]",
        b'{"original_width": "640", "original_height": 480}',
        b'{"original_width": 640}',
        b'{"original_width": -1, "original_height": 480}',
        b'{"original_width": true, "original_height": true}',
    ],
)
def test_a_json_that_tells_no_size_gives_way_to_the_picture(tmp_path, encoders, about):
    known = json.dumps({"original_width": 640, "original_height": 480}).encode()
    odd, even = foreign(0, json=about), foreign(1, json=known)
    dataset = publish(tmp_path / "data", [[odd, even]])
    encode.run(config(dataset, encoders))
    sizes = {
        key: (facts["original_width"], facts["original_height"])
        for key, (facts, _) in rows_of(dataset).items()
    }
    assert sizes == {odd.key: (32, 32), even.key: (640, 480)}


def test_a_side_that_does_not_fit_the_autoencoder_is_refused_and_the_told_one_works(
    tmp_path, encoders
):
    dataset = scenes_dataset(tmp_path / "data", num_shards=1, per_shard=2)
    with pytest.raises(BadInput, match=r"image_side_px=17 is no multiple of 2.*Try 16\."):
        encode.run(config(dataset, encoders, side_px=17))
    with pytest.raises(BadInput, match=r"image_side_px=1 is no multiple of 2.*Try 2\."):
        encode.run(config(dataset, encoders, side_px=1, dry_run=True))
    assert encode.run(config(dataset, encoders, side_px=16)) == 0


def test_a_dataset_without_samples_is_refused(tmp_path, encoders):
    manifest = Manifest(shards=(), rows_in=7, rows_kept=0, rejected={"blank": 7})
    save_manifest(tmp_path, manifest)
    for dry_run in (False, True):
        with pytest.raises(BadInput, match="no samples: all of its 7 rows were rejected"):
            encode.run(config(tmp_path, encoders, dry_run=dry_run))
    with pytest.raises(BadInput, match="has no samples: there is nothing to train on"):
        make_law([Dataset(tmp_path, manifest, None)], Layout(seed=0))


def cut(content):
    return content[: len(content) // 2]


def flip(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def not_finite(content):
    return content[:-2] + np.float16(np.nan).tobytes()


def flat(_content):
    file = BytesIO()
    np.save(file, np.zeros(4, np.float16))
    return file.getvalue()


def empty(_content):
    return b""


@pytest.mark.parametrize("damage", [cut, flip, not_finite, flat, empty])
def test_damaged_states_of_the_empty_caption_are_noticed_and_made_anew(
    tmp_path, encoders, damage, capsys
):
    dataset = scenes_dataset(tmp_path / "data", num_shards=1, per_shard=2)
    cfg = config(dataset, encoders)
    encode.run(cfg)
    (encoding,) = list_encodings(dataset)
    path = encoding_folder(dataset, encoding.fingerprint) / NULL_TEXT
    whole = path.read_bytes()
    for gone in ((), ("encoding.json",), ("encoding.json", "units/00000.json")):
        path.write_bytes(damage(whole))
        assert verify.run(VerifyConfig(dataset=dataset)) == 1
        assert f"{NULL_TEXT} is damaged" in capsys.readouterr().out
        for name in gone:
            (path.parent / name).unlink()
        assert encode.run(cfg) == 0
        assert path.read_bytes() == whole
        assert verify.run(VerifyConfig(dataset=dataset)) == 0
    assert list_encodings(dataset) == [encoding]


@pytest.mark.parametrize("damage", [cut, not_finite, flat, empty])
def test_nobody_trains_with_damaged_states_of_the_empty_caption(tmp_path, damage):
    whole = BytesIO()
    np.save(whole, np.ones((2, 3), np.float16))
    (tmp_path / NULL_TEXT).write_bytes(whole.getvalue())
    np.testing.assert_array_equal(read_null_text(tmp_path), np.ones((2, 3)))
    (tmp_path / NULL_TEXT).write_bytes(damage(whole.getvalue()))
    with pytest.raises(BadInput, match=r"null_text.npy is damaged.*`kiln encode`"):
        read_null_text(tmp_path)
    (tmp_path / NULL_TEXT).unlink()
    with pytest.raises(BadInput, match=r"null_text.npy is not there.*`kiln encode`"):
        read_null_text(tmp_path)
