"""Laws of `kiln encode`."""

import hashlib
import os
import shutil
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep import encode
from data_prep.config import EncodeConfig
from tests import tiny_encoders
from tests.tiny_dataset import publish, sample, scenes_dataset
from trainer.data.manifest import (
    check_files,
    encoding_folder,
    list_encodings,
    load_manifest,
    save_manifest,
)
from trainer.data.shards import Shard, read_index
from trainer.data.sources import LatentSource, decode_square
from trainer.errors import BadInput
from trainer.frozen import compose, freeze, thaw
from trainer.models.autoencoders import load_autoencoder
from trainer.models.text_encoders import load_text_encoder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return tiny_encoders.save_kl(folder / "kl"), tiny_encoders.save_t5(folder / "t5")


def config(dataset, folders, **changes):
    kl, t5 = folders
    cfg = compose(
        EncodeConfig,
        "encode",
        [
            f"dataset={dataset}",
            "text=t5_base",
            f"encoders.autoencoder.path={kl}",
            f"encoders.text.path={t5}",
            "encoders.image_side_px=16",
            "batch_images=4",
            "batch_tokens=32",
            "threads=1",
            "decode_threads=1",
            "probe_s=0",
        ],
    )
    return freeze(EncodeConfig, thaw(cfg) | changes)


def content(dataset):
    """Relative path -> hash of everything in the encodings."""
    folder = dataset / "encodings"
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, encoders):
    """An encoded dataset; tests that change it take a copy."""
    dataset = scenes_dataset(tmp_path_factory.mktemp("data") / "scenes")
    cfg = config(dataset, encoders)
    assert encode.run(cfg) == 0
    return cfg


def copy_of(cfg, tmp_path):
    dataset = shutil.copytree(cfg.dataset, tmp_path / "copy")
    return replace(cfg, dataset=dataset)


def only_encoding(dataset):
    (encoding,) = list_encodings(dataset)
    return encoding, encoding_folder(dataset, encoding.fingerprint)


def test_each_sample_has_its_latent_and_its_text(encoded):
    manifest = load_manifest(encoded.dataset)
    encoding, folder = only_encoding(encoded.dataset)
    assert encoding.dataset_fingerprint == manifest.fingerprint
    check_files(folder, encoding.shards)
    autoencoder = load_autoencoder(encoded.encoders.autoencoder)
    text = load_text_encoder(encoded.encoders.text)
    for ours, theirs in zip(encoding.shards, manifest.shards, strict=True):
        source = members(theirs.tar(encoded.dataset), theirs.index(encoded.dataset))
        sidecar = members(ours.tar(folder), ours.index(folder))
        assert list(source) == list(sidecar)
        for key, given in source.items():
            picture = decode_square(given["png"], 16, name="a picture")
            tensor = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
            wanted = torch.cat(autoencoder.moments(tensor))
            latent = npy(sidecar[key]["latent.npy"])
            assert latent.dtype == np.float16
            np.testing.assert_allclose(latent, wanted, rtol=2e-3, atol=2e-3)
            (states,) = text.encode([given["txt"].decode()])
            np.testing.assert_allclose(npy(sidecar[key]["text.npy"]), states, rtol=2e-3, atol=2e-3)


def members(tar, index):
    with Shard(tar, read_index(index)) as shard:
        return {
            key: {ext: shard.read(row, ext) for ext in shard.extensions(row)}
            for row, key in enumerate(shard.keys)
        }


def npy(data):
    return np.load(BytesIO(data), allow_pickle=False)


def test_the_facts_are_those_of_the_latents(encoded):
    encoding, folder = only_encoding(encoded.dataset)
    source = LatentSource(encoded.dataset, encoding, device=torch.device("cpu"))
    numbers = np.arange(source.num_samples)
    batch = source.load(numbers, np.zeros_like(numbers))
    source.close()
    facts = encoding.facts
    assert facts["latent_shape"] == list(batch.mean_BCHW.shape[1:])
    assert facts["text_width"] == batch.text_BLD.shape[2]
    mean, var = batch.mean_BCHW.double(), batch.logvar_BCHW.double().exp()
    np.testing.assert_allclose(facts["latent_mean"], mean.mean((0, 2, 3)), rtol=1e-9)
    spread = (mean**2 + var).mean((0, 2, 3)) - mean.mean((0, 2, 3)) ** 2
    np.testing.assert_allclose(facts["latent_std"], spread.sqrt(), rtol=1e-9)
    null_text = np.load(folder / "null_text.npy", allow_pickle=False)
    assert null_text.dtype == np.float16
    assert null_text.shape[1] == facts["text_width"]


def test_again_there_is_nothing_to_do(encoded, capsys):
    before = {p: p.stat().st_mtime_ns for p in (encoded.dataset / "encodings").rglob("*")}
    assert encode.run(encoded) == 0
    assert "nothing to do" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in (encoded.dataset / "encodings").rglob("*")}
    assert before == after


def test_made_twice_it_is_the_same_byte_for_byte(encoded, encoders, tmp_path):
    again = scenes_dataset(tmp_path / "again")
    encode.run(config(again, encoders))
    assert content(again) == content(encoded.dataset)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("name", "damage", "recheck"),
    [
        ("00001.tar", cut, "sizes"),
        ("00001.tar", remove, "sizes"),
        ("00001.tar", flip, "hashes"),
        ("index/00001.parquet", cut, "sizes"),
        ("units/00001.json", cut, "sizes"),
        ("units/00001.json", remove, "sizes"),
        ("encoding.json", remove, "sizes"),
        ("encoding.json", cut, "sizes"),
        ("null_text.npy", remove, "sizes"),
    ],
)
def test_damage_is_repaired_and_nothing_else_touched(encoded, tmp_path, name, damage, recheck):
    cfg = replace(copy_of(encoded, tmp_path), recheck=recheck)
    _, folder = only_encoding(cfg.dataset)
    untouched = folder / "00000.tar"
    before = untouched.stat().st_mtime_ns
    damage(folder / name)
    assert encode.run(cfg) == 0
    assert content(cfg.dataset) == content(encoded.dataset)
    assert untouched.stat().st_mtime_ns == before


def test_a_half_finished_encoding_goes_on(encoded, tmp_path):
    """As after a kill -9: one shard done, no encoding.json, half a file left behind."""
    cfg = copy_of(encoded, tmp_path)
    _, folder = only_encoding(cfg.dataset)
    for name in ("encoding.json", "00001.tar", "units/00001.json", "index/00001.parquet"):
        (folder / name).unlink()
    (folder / ".00001.tar.partial").write_bytes(b"half")
    assert encode.run(cfg) == 0
    assert content(cfg.dataset) == content(encoded.dataset)


def test_a_changed_shard_is_encoded_anew_and_a_vanished_one_goes(encoded, tmp_path):
    cfg = copy_of(encoded, tmp_path)
    manifest = load_manifest(cfg.dataset)
    changed = publish(tmp_path / "other", [[sample(90), sample(91)]])
    shutil.copytree(changed / "shards", cfg.dataset / "shards", dirs_exist_ok=True)
    shutil.copytree(changed / "index", cfg.dataset / "index", dirs_exist_ok=True)
    save_manifest(cfg.dataset, load_manifest(changed))
    assert load_manifest(cfg.dataset).fingerprint != manifest.fingerprint
    encode.run(cfg)
    encoding, folder = only_encoding(cfg.dataset)
    assert encoding.dataset_fingerprint == load_manifest(cfg.dataset).fingerprint
    assert [shard.count for shard in encoding.shards] == [2]
    assert not (folder / "00001.tar").exists()


def test_other_encoders_get_a_place_of_their_own(encoded, encoders, tmp_path):
    cfg = copy_of(encoded, tmp_path)
    kl, t5 = encoders
    other = config(cfg.dataset, (kl, t5), encoders=thaw(cfg)["encoders"] | {"image_side_px": 8})
    encode.run(other)
    assert len(list_encodings(cfg.dataset)) == 2
    before = content(encoded.dataset)
    assert before.items() <= content(cfg.dataset).items()


def test_equal_captions_are_encoded_once_and_empty_ones_are_captions(tmp_path, encoders):
    samples = [
        sample(i, text=text) for i, text in enumerate(["a circle", "a circle", "", "a ring"])
    ]
    dataset = publish(tmp_path / "data", [samples])
    encode.run(config(dataset, encoders))
    encoding, folder = only_encoding(dataset)
    texts = {s.key: s.members["txt"] for s in samples}
    states = {}
    with Shard(folder / "00000.tar", read_index(encoding.shards[0].index(folder))) as shard:
        for row, key in enumerate(shard.keys):
            states.setdefault(texts[key], set()).add(shard.read(row, "text.npy"))
    assert all(len(each) == 1 for each in states.values())
    assert states[b""] == {(folder / "null_text.npy").read_bytes()}


def test_the_ledger_counts_the_seconds(encoded):
    rows = (encoded.dataset / "ledger.jsonl").read_text().splitlines()
    assert any('"encode"' in row and '"productive"' in row for row in rows)


def test_a_picture_that_does_not_decode_is_named(tmp_path, encoders):
    bad = sample(0)
    bad = bad._replace(members=dict(bad.members) | {"png": b"no picture"})
    dataset = publish(tmp_path / "data", [[bad]])
    with pytest.raises(BadInput, match=f"{bad.key}.png does not decode"):
        encode.run(config(dataset, encoders))
    assert list_encodings(dataset) == []


def test_latents_that_are_not_finite_are_refused(tmp_path, encoders):
    kl = shutil.copytree(encoders[0], tmp_path / "kl")
    weights = load_file(kl / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.weight"].fill_(float("nan"))
    save_file(weights, kl / "diffusion_pytorch_model.safetensors")
    dataset = scenes_dataset(tmp_path / "data", num_shards=1, per_shard=2)
    with pytest.raises(BadInput, match="not finite"):
        encode.run(config(dataset, (kl, encoders[1])))


def test_a_missing_gpu_is_said(tmp_path, encoders):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    dataset = scenes_dataset(tmp_path / "data", num_shards=1, per_shard=2)
    with pytest.raises(BadInput, match="Try device=cpu"):
        encode.run(config(dataset, encoders, device="cuda"))


def test_an_unfinished_dataset_is_refused(tmp_path, encoders):
    with pytest.raises(BadInput, match="kiln prepare"):
        encode.run(config(tmp_path / "none", encoders))


def test_a_cut_source_tar_is_refused_before_anything_is_encoded(encoded, tmp_path):
    cfg = copy_of(encoded, tmp_path)
    shutil.rmtree(cfg.dataset / "encodings")
    cut(cfg.dataset / "shards/00001.tar")
    with pytest.raises(BadInput, match="does not match the manifest"):
        encode.run(cfg)
