"""Laws of `kiln encode`."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data_prep import encode, verify
from data_prep.config import EncodeConfig, VerifyConfig
from data_prep.probe import probe
from tests import tiny_encoders
from tests.streams import ids, latents, load, size
from tests.tiny_dataset import publish, sample, scenes_dataset
from trainer.data.decode import cover, decode_square
from trainer.data.manifest import (
    check_files,
    encoding_folder,
    list_encodings,
    load_manifest,
    save_manifest,
)
from trainer.data.shards import Sample, Shard, read_index
from trainer.data.stream import Slots
from trainer.errors import BadInput
from trainer.frozen import compose, freeze, thaw
from trainer.models.autoencoders import load_autoencoder
from trainer.models.fingerprint import identify
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
            "wandb=off",
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
    with latents(encoded.dataset) as source:
        batch = load(source, np.arange(size(source)))
    facts = encoding.facts
    assert encoding.bucket_counts == {"16x16": [entry.count for entry in encoding.shards]}
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


def test_an_encoding_of_before_bucket_counts_gets_them_and_keeps_its_tars(encoded, tmp_path):
    cfg = copy_of(encoded, tmp_path)
    _, folder = only_encoding(cfg.dataset)
    path, before = folder / "encoding.json", (folder / "00000.tar").stat().st_mtime_ns
    old = json.loads(path.read_text())
    del old["bucket_counts"]
    path.write_text(json.dumps(old))
    assert encode.run(cfg) == 0
    assert content(cfg.dataset) == content(encoded.dataset)
    assert (folder / "00000.tar").stat().st_mtime_ns == before


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


def results(dataset):
    """Key -> members of the sidecars, whatever shard they are in."""
    encoding, folder = only_encoding(dataset)
    found = {}
    for shard in encoding.shards:
        found |= members(shard.tar(folder), shard.index(folder))
    return found


@pytest.mark.parametrize("threads", [1, 3])
def test_neither_neighbours_nor_threads_change_a_bit(tmp_path, encoders, threads):
    """The same samples in one shard, and in five, so that batches hold others."""
    samples = [sample(i) for i in range(23)]
    one = publish(tmp_path / "one", [samples])
    encode.run(config(one, encoders))
    dice = np.random.default_rng(threads)
    parts = np.split(np.array(range(23)), sorted(dice.choice(22, 4, replace=False) + 1))
    order = dice.permutation(23)
    five = publish(tmp_path / "five", [[samples[order[i]] for i in part] for part in parts])
    encode.run(config(five, encoders, threads=threads, decode_threads=3))
    assert results(one) == results(five)


def test_the_shipped_encoders_give_a_sample_the_same_bits_in_any_full_batch(tmp_path):
    samples = [sample(i, side_px=64) for i in range(9)]
    found = []
    for name, order in (("a", range(9)), ("b", (4, 8, 0, 2, 6, 1, 7, 3, 5))):
        shards = [[samples[i] for i in order[:5]], [samples[i] for i in order[5:]]]
        dataset = publish(tmp_path / name, shards)
        words = [f"dataset={dataset}", "batch_images=4", "threads=1", "probe_s=0"]
        encode.run(compose(EncodeConfig, "encode", words))
        found.append(results(dataset))
    assert found[0] == found[1]


@pytest.mark.parametrize("seed", range(3))
def test_interrupted_anywhere_and_resumed_it_is_the_same_byte_for_byte(
    encoders, tmp_path, many_shards, seed
):
    """Any set of shards may be there already; the others are packed differently then."""
    dice = np.random.default_rng(seed)
    dataset = shutil.copytree(many_shards.dataset, tmp_path / "copy")
    _, folder = only_encoding(dataset)
    (folder / "encoding.json").unlink()
    for number in dice.choice(7, 1 + dice.integers(6), replace=False):
        (folder / f"units/{number:05d}.json").unlink()
        (folder / f"{number:05d}.tar").unlink()
    encode.run(config(dataset, encoders, threads=int(dice.integers(1, 4)), decode_threads=2))
    assert content(dataset) == content(many_shards.dataset)


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory, encoders):
    dataset = tmp_path_factory.mktemp("many") / "data"
    cfg = config(scenes_dataset(dataset, num_shards=7, per_shard=5), encoders)
    encode.run(cfg)
    return cfg


def test_killed_and_resumed_it_is_the_same_byte_for_byte(many_shards, tmp_path):
    dataset = shutil.copytree(many_shards.dataset, tmp_path / "copy")
    shutil.rmtree(dataset / "encodings")
    cfg = replace(many_shards, dataset=dataset)
    (fingerprint,) = (path.name for path in (many_shards.dataset / "encodings").iterdir())
    code = (
        "import sys; from data_prep import encode; from data_prep.config import EncodeConfig; "
        "from trainer.frozen import freeze; import json; "
        "encode.run(freeze(EncodeConfig, json.loads(sys.argv[1])))"
    )
    words = [sys.executable, "-c", code, json.dumps(thaw(cfg))]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        while not list(dataset.glob(f"encodings/{fingerprint}/*.tar")):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    encode.run(cfg)
    assert content(dataset) == content(many_shards.dataset)


def test_parts_together_are_the_whole(many_shards, tmp_path, capsys):
    dataset = shutil.copytree(many_shards.dataset, tmp_path / "copy")
    shutil.rmtree(dataset / "encodings")
    for part in (2, 0):
        encode.run(replace(many_shards, dataset=dataset, parts=3, part=part))
        assert list_encodings(dataset) == []
    assert "5 of 7 shards" in capsys.readouterr().out
    encode.run(replace(many_shards, dataset=dataset, parts=3, part=1))
    assert content(dataset) == content(many_shards.dataset)


def test_a_part_that_there_is_not_is_refused(many_shards):
    with pytest.raises(BadInput, match="need 0 to parts - 1 = 2"):
        freeze(EncodeConfig, thaw(many_shards) | {"parts": 3, "part": 3})


def test_the_status_has_the_share_of_the_encoders(many_shards):
    (path,) = (many_shards.dataset / "status").glob("encode-*.json")
    status = json.loads(path.read_bytes())
    assert status["images"] == 35
    assert 0 < status["encoder_busy_frac"] <= 1
    assert set(status["encoder_busy_s"]) == {"images", "captions"}


BUCKETS = {"max_aspect": 2.0, "step_px": 4}


def shaped(index, width, height):
    """A sample of that size, whose original was ten times as large."""
    file = BytesIO()
    noise = np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    about = {"original_width": 10 * width, "original_height": 10 * height} if index % 2 else {}
    given = sample(index)
    return Sample(
        given.key,
        {**given.members, "png": file.getvalue(), "json": json.dumps(about).encode()},
    )


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory, encoders):
    """Pictures of many shapes, the configuration and the samples by key."""
    dice = np.random.default_rng(0)
    samples = [shaped(i, *dice.integers(8, 60, 2).tolist()) for i in range(40)]
    dataset = tmp_path_factory.mktemp("bucketed") / "data"
    publish(dataset, [samples[:13], samples[13:20], samples[20:]])
    cfg = config(dataset, encoders)
    cfg = config(dataset, encoders, encoders=thaw(cfg)["encoders"] | {"buckets": BUCKETS})
    encode.run(cfg)
    return cfg, {s.key: s for s in samples}


def test_each_picture_is_encoded_at_its_bucket(bucketed):
    cfg, samples = bucketed
    encoding, folder = only_encoding(cfg.dataset)
    autoencoder = load_autoencoder(cfg.encoders.autoencoder)
    num_seen = 0
    for entry in encoding.shards:
        index = read_index(entry.index(folder))
        found = members(entry.tar(folder), entry.index(folder))
        for row in index.to_pylist():
            width, height = map(int, row["bucket"].split("x"))
            given = samples[row["key"]].members
            with Image.open(BytesIO(given["png"])) as picture:
                original = json.loads(given["json"]) or {
                    "original_width": picture.width,
                    "original_height": picture.height,
                }
                covered = cover(np.asarray(picture)[..., ::-1], width, height)
            assert original.items() <= row.items()
            assert (row["crop_top"], row["crop_left"]) == (covered.top, covered.left)
            tensor = torch.from_numpy(covered.rgb_HWC.copy()).permute(2, 0, 1)[None]
            wanted = torch.cat(autoencoder.moments(tensor.float() / 127.5 - 1))
            latent = npy(found[row["key"]]["latent.npy"])
            assert latent.shape[2:] == (row["latent_rows"], row["latent_columns"])
            assert latent.shape[2:] == (height // 2, width // 2)
            np.testing.assert_allclose(latent, wanted, rtol=2e-3, atol=2e-3)
            num_seen += 1
    assert num_seen == len(samples)


def test_buckets_are_counted_and_named(bucketed):
    encoding, folder = only_encoding(bucketed[0].dataset)
    assert len(encoding.bucket_counts) > 2
    assert sum(encoding.bucket_totals.values()) == 40
    seen = [read_index(entry.index(folder))["bucket"].to_pylist() for entry in encoding.shards]
    assert encoding.bucket_counts == {
        name: [shard.count(name) for shard in seen] for name in sorted(set().union(*seen))
    }
    assert encoding.facts["buckets"] == BUCKETS
    assert encoding.facts["latent_shape"] == [4, 8, 8]


def test_buckets_do_not_depend_on_where_a_run_was_interrupted(bucketed, tmp_path):
    cfg, _ = bucketed
    dataset = shutil.copytree(cfg.dataset, tmp_path / "copy")
    _, folder = only_encoding(dataset)
    (folder / "00001.tar").unlink()
    encode.run(replace(cfg, dataset=dataset, threads=2))
    assert content(dataset) == content(cfg.dataset)


def test_a_bucketed_encoding_verifies(bucketed):
    assert verify.run(VerifyConfig(dataset=bucketed[0].dataset)) == 0


def test_a_global_batch_has_latents_of_one_bucket(bucketed):
    dataset = bucketed[0].dataset
    with latents(dataset) as source:
        law, seen = source.samples.law, []
        for bucket, rows in law.sizes[0].items():
            batch = source.load(Slots(bucket, np.zeros(rows, np.int64), np.arange(rows)))
            width, height = map(int, bucket.split("x"))
            assert batch.mean_BCHW.shape[0] == rows
            assert batch.mean_BCHW.shape[3] / batch.mean_BCHW.shape[2] == width / height
            seen += ids(batch)
    assert len(law.buckets) > 1
    assert len(set(seen)) == len(seen) == load_manifest(dataset).rows_kept


def test_buckets_have_a_name_of_their_own(bucketed):
    given = bucketed[0].encoders
    square = replace(given, buckets=None)
    wider = replace(given, buckets=replace(given.buckets, max_aspect=3.0))
    assert len({identify(each).fingerprint for each in (given, square, wider)}) == 3
    assert "buckets" not in identify(square).facts


def test_a_step_that_does_not_fit_the_autoencoder_is_refused(bucketed):
    cfg, _ = bucketed
    odd = replace(cfg.encoders, image_side_px=15, buckets=replace(cfg.encoders.buckets, step_px=3))
    with pytest.raises(BadInput, match="Try 4"):
        encode.run(replace(cfg, encoders=odd))


def test_a_dry_run_measures_and_leaves_everything_as_it_is(encoded, tmp_path, capsys):
    cfg = copy_of(encoded, tmp_path)
    shutil.rmtree(cfg.dataset / "encodings")
    assert encode.run(replace(cfg, dry_run=True, probe_s=0.1)) == 0
    out = capsys.readouterr().out
    assert "still to encode, 12 images" in out
    assert "from the second epoch on" in " ".join(out.split())
    assert "Decision: cache." in " ".join(out.split())
    assert not (cfg.dataset / "encodings").exists()


def test_the_probe_foretells_the_bytes(encoded, encoders, tmp_path):
    dataset = scenes_dataset(tmp_path / "data", num_shards=1, per_shard=60)
    cfg = config(dataset, encoders)
    entry = load_manifest(dataset).shards[0]
    found = probe(dataset, entry, encode.load_encoders(cfg), side_px=16, probe_s=0.1)
    encode.run(cfg)
    encoding, folder = only_encoding(dataset)
    end_bytes = 10_240  # a tar is filled up to a multiple of this
    num_bytes = encoding.shards[0].tar(folder).stat().st_size
    assert 0 < num_bytes - 60 * found.sample_bytes <= end_bytes
    assert found.images_per_s > 0
    assert found.sample_s > 1 / found.images_per_s


def test_a_cache_that_does_not_fit_is_refused_before_it_is_made(encoded, tmp_path, monkeypatch):
    cfg = replace(copy_of(encoded, tmp_path), probe_s=0.1)
    shutil.rmtree(cfg.dataset / "encodings")
    # A disk cannot be filled up here.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
    with pytest.raises(BadInput, match=r"12 images take 0\.0\d\d MB, and 0\.001 MB are free"):
        encode.run(cfg)
    assert not list((cfg.dataset / "encodings").rglob("*.tar"))
    assert encode.run(replace(cfg, dry_run=True)) == 0
    assert encode.run(replace(cfg, probe_s=0)) == 0
    assert content(cfg.dataset) == content(encoded.dataset)


def test_a_sample_without_a_picture_is_named(tmp_path, encoders):
    bare = sample(0)
    bare = bare._replace(members={"txt": b"a circle", "json": b"{}"})
    dataset = publish(tmp_path / "data", [[bare]])
    with pytest.raises(BadInput, match=f"00000.tar: {bare.key} has json, txt; need one of jpg"):
        encode.run(config(dataset, encoders))
