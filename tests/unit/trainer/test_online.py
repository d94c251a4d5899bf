"""Encoding while training gives what `kiln encode` writes; what cannot be encoded is refused."""

import json
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.exports import export_config
from tests.streams import captioned, latents, load, size
from tests.tiny import tiny_config
from tests.tiny_dataset import publish, sample
from tests.tiny_encoders import save_kl
from tests.tiny_run import SIDE_PX, denoiser_config, encode_dataset, save_run
from trainer import export, train
from trainer.config import AutoencoderConfig
from trainer.config_tools import EvaluateConfig
from trainer.data.manifest import encoding_folder, list_encodings, load_manifest
from trainer.data.null_text import read_null_text
from trainer.data.opening import Dataset
from trainer.data.shards import Sample
from trainer.encoded import RECORD, Latents, latents_of, read_record, write_record
from trainer.errors import BadInput
from trainer.frozen import compose
from trainer.judge import Judge
from trainer.models.autoencoders import load_autoencoder
from trainer.models.denoisers import build_denoiser
from trainer.models.encoders import load_frozen_encoders
from trainer.observe.jsonl import read_rows
from trainer.online import OnlineEncoder, check_online, open_online
from trainer.sampler import load_sampler

CPU = torch.device("cpu")
# The last bit of fp16 may be another one: batches of other sizes go through other kernels.
HALF = {"rtol": 2e-3, "atol": 1e-3}


def no_span(_bucket):
    return nullcontext()


class Alone:
    """What is asked of the other ranks, when there are none."""

    rank, world, device = 0, 1, CPU

    def sum(self, values):
        return list(values)


@pytest.fixture
def unencoded(tiny_scenes, tmp_path):
    """The same dataset without its encoding."""
    folder = tmp_path / "unencoded"
    return shutil.copytree(tiny_scenes, folder, ignore=shutil.ignore_patterns("encodings"))


@pytest.fixture
def encoder(tiny_encoder_section):
    return OnlineEncoder(load_frozen_encoders(tiny_encoder_section, CPU), CPU)


def online_config(run, dataset, encoders, **changes):
    return denoiser_config(run, dataset, encoders, data__latents="online", **changes)


def with_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def dataset_of(folder):
    return Dataset(folder, load_manifest(folder), None)


def test_a_batch_is_the_one_that_encoded_latents_give(tiny_scenes, encoder):
    with latents(tiny_scenes) as written, captioned(tiny_scenes, side_px=SIDE_PX) as pictures:
        for epoch, chosen in ((0, [3, 0, 7, 11, 5]), (2, range(size(written)))):
            theirs = load(written, np.array(chosen), epoch=epoch)
            ours = encoder(load(pictures, np.array(chosen), epoch=epoch), no_span)
            for exact in ("ids_B", "visits_B", "text_mask_BL"):
                assert torch.equal(getattr(ours, exact), getattr(theirs, exact)), exact
            for name in ("mean_BCHW", "logvar_BCHW", "text_BLD"):
                mine, wanted = getattr(ours, name), getattr(theirs, name)
                assert mine.dtype == wanted.dtype
                assert mine.stride() == wanted.stride()
                torch.testing.assert_close(mine, wanted, **HALF)
            assert not ours.text_BLD[~ours.text_mask_BL].any()
            assert not ours.mean_BCHW.is_inference()


def test_the_empty_caption_is_the_encodings(tiny_scenes, encoder):
    folder = encoding_folder(tiny_scenes, list_encodings(tiny_scenes)[0].fingerprint)
    (mine,) = encoder.states([""])
    torch.testing.assert_close(mine.numpy(), read_null_text(folder), **HALF)


def test_only_the_encoders_are_accounted_for_as_encoding(tiny_scenes, encoder):
    opened = []

    @contextmanager
    def span(bucket):
        opened.append(bucket)
        yield

    with captioned(tiny_scenes, side_px=SIDE_PX) as pictures:
        batch = load(pictures, np.arange(2))
        assert not opened
        encoder(batch, span)
    assert opened == ["encoding"]


def test_a_sample_without_a_caption_is_replaced_and_written_down(tmp_path):
    whole = [sample(number) for number in range(6)]
    bare = Sample(whole[2].key, {"png": whole[2].members["png"]})
    dataset = publish(tmp_path / "data", [[bare, *whole[:2], *whole[3:]]])
    log = tmp_path / "quarantine.jsonl"
    with captioned(dataset, side_px=16, log=log, max_bad_frac=1.0) as source:
        batch = load(source, np.arange(6))
    assert int(bare.key, 16) not in batch.ids_B.numpy().view(np.uint64).tolist()
    assert len(batch.captions) == len(batch.names) == 6
    (row,) = read_rows(log)
    assert row["key"] == bare.key
    assert "has no caption" in row["why"]


def test_what_is_not_finite_is_named(tiny_scenes, tiny_encoder_section):
    encoders = load_frozen_encoders(tiny_encoder_section, CPU)
    encoder = OnlineEncoder(encoders, CPU)
    with captioned(tiny_scenes, side_px=SIDE_PX) as source:
        batch = load(source, np.arange(3))
    encoders.autoencoder.net.quant_conv.bias.fill_(torch.inf)
    with pytest.raises(BadInput, match=r"latents that are not finite for [0-9a-f]{16}\.png in "):
        encoder(batch, no_span)
    encoders.text.net.encoder.final_layer_norm.weight.fill_(torch.nan)
    with pytest.raises(BadInput, match="states that are not finite for the caption 'a red ring'"):
        encoder.states(["a red ring"])


def test_fingerprint_and_facts_are_those_of_the_encoding(
    tiny_scenes, unencoded, tiny_encoder_section, tmp_path
):
    wanted = list_encodings(tiny_scenes)[0]
    for number, dataset in enumerate((tiny_scenes, unencoded)):
        cfg = online_config(tmp_path / str(number), dataset, tiny_encoder_section)
        online = open_online(cfg, dataset_of(dataset), Alone(), has_begun=False)
        facts = read_record(tmp_path / str(number)).facts
        assert online.fingerprint == wanted.fingerprint
        for name in ("latent_shape", "text_width", "autoencoder", "text"):
            assert facts[name] == wanted.facts[name], name
        assert online.statistics == (facts["latent_mean"], facts["latent_std"])
        same = facts["latent_std"] == wanted.facts["latent_std"]
        assert same == (dataset == tiny_scenes)


def test_without_an_encoding_latents_are_normalised_as_the_autoencoder_says(
    unencoded, tiny_encoder_section, tmp_path
):
    cfg = online_config(tmp_path / "run", unencoded, tiny_encoder_section)
    online = open_online(cfg, dataset_of(unencoded), Alone(), has_begun=False)
    assert online.statistics.mean == [0.0] * 4
    assert online.statistics.std == pytest.approx([1 / 0.18215] * 4)  # diffusers' default
    assert online.null_text_LD.dtype == torch.float32


@pytest.mark.parametrize(
    ("said", "mean", "std"),
    [
        ({"shift_factor": 0.5, "scaling_factor": 2.0}, [0.5] * 4, [0.5] * 4),
        (
            {"latents_mean": [1, 2, 3, 4], "latents_std": [4, 2, 1, 8], "scaling_factor": 0.5},
            [1.0, 2.0, 3.0, 4.0],
            [8.0, 4.0, 2.0, 16.0],
        ),
    ],
)
def test_an_autoencoder_may_shift_its_latents_or_say_it_of_each_channel(tmp_path, said, mean, std):
    folder = with_config(save_kl(tmp_path), **said)
    found = load_autoencoder(AutoencoderConfig(kind="kl", path=str(folder))).statistics
    assert found == (mean, std)


def test_latents_of_an_autoencoder_that_says_nothing_are_measured(
    tiny_encoder_section, unencoded, tmp_path
):
    """Of so few pictures, by all of them: just what the encoding says of the dataset."""
    kl = with_config(save_kl(tmp_path / "kl"), scaling_factor=1.0)
    encoders = replace(tiny_encoder_section, autoencoder=AutoencoderConfig(kind="kl", path=str(kl)))
    cfg = online_config(tmp_path / "run", unencoded, encoders)
    found = open_online(cfg, dataset_of(unencoded), Alone(), has_begun=False).statistics
    encode_dataset(unencoded, encoders)
    wanted = list_encodings(unencoded)[0].facts
    np.testing.assert_allclose(found.mean, wanted["latent_mean"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.std, wanted["latent_std"], rtol=1e-3)
    assert read_record(tmp_path / "run").facts["latent_statistics"] == "12 pictures"


def test_the_normalisation_of_a_run_stays_when_an_encoding_comes(
    unencoded, tiny_encoder_section, tmp_path
):
    cfg = online_config(tmp_path / "run", unencoded, tiny_encoder_section)
    before = open_online(cfg, dataset_of(unencoded), Alone(), has_begun=False).statistics
    encode_dataset(unencoded, tiny_encoder_section)
    again = open_online(cfg, dataset_of(unencoded), Alone(), has_begun=True)
    assert again.statistics == before
    assert latents_of(cfg, tmp_path / "run").facts["latent_std"] == before.std


def test_all_commands_work_with_a_run_whose_dataset_has_no_encoding(
    tiny_scenes, unencoded, tiny_encoder_section, tmp_path
):
    (encoding,) = list_encodings(tiny_scenes)
    torch.manual_seed(0)
    samplers = {}
    for name, dataset in (("encoded", tiny_scenes), ("online", unencoded)):
        run = tmp_path / name
        cfg = denoiser_config(run, dataset, tiny_encoder_section, data__latents=name)
        model = build_denoiser(cfg.model, seed=5)
        nn.init.constant_(model.inner.proj_out.weight, 0.01)
        save_run(cfg, run, model, encoding=encoding.fingerprint)
        if name == "online":
            write_record(run, Latents(encoding.fingerprint, encoding.facts))
        samplers[name] = load_sampler(run, device="cpu", threads=1)
    words = ["sampling.num_steps=2", "num_loss_pairs=6", "num_loss_times=2", "features=none"]
    words += ["num_captions=2", "num_unseen_pairs=1", "threads=1"]
    pairs = []
    for name, sampler in samplers.items():
        cfg = compose(EvaluateConfig, "evaluate", [f"run={tmp_path / name}", *words])
        cfg = replace(cfg, validation=str(sampler.cfg.data.dataset))
        pairs.append(Judge(cfg, sampler, lambda _: None).pairs)
    drawn = [sampler.sample(["a red ring"], cfg.sampling) for sampler in samplers.values()]
    np.testing.assert_array_equal(*drawn)
    torch.testing.assert_close(pairs[0].x0_NCHW, pairs[1].x0_NCHW, rtol=0, atol=1e-2)
    assert export.run(export_config(tmp_path / "online", tmp_path / "out")) == 0
    facts = json.loads((tmp_path / "out/training.json").read_text())["encoding"]
    assert facts["latent_mean"] == encoding.facts["latent_mean"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"data__reader": "webdataset", "data__epoch_images": 9},
            "needs captions, and data.reader=webdataset gives pictures alone",
        ),
        (
            {"encoders__buckets": {"max_aspect": 2, "step_px": 8}},
            "encoders.buckets needs the shapes of all pictures before",
        ),
    ],
)
def test_what_cannot_be_encoded_while_training_is_refused(changes, match):
    with pytest.raises(BadInput, match=match):
        tiny_config(data__latents="online", **changes)


def test_a_first_stage_has_no_latents_to_choose():
    words = ["model=autoencoder_small", "objective=reconstruction", "data.latents=online"]
    with pytest.raises(BadInput, match=r"data.latents=online is for denoisers.*latents=encoded"):
        compose(train.TrainConfig, "train", ["data.dataset=none", *words])


def test_a_run_that_could_not_encode_is_refused_before_its_ranks_start(
    unencoded, tiny_encoder_section, tmp_path
):
    cfg = online_config(tmp_path / "run", unencoded, tiny_encoder_section)
    bare = [Sample(sample(n).key, {"png": sample(n).members["png"]}) for n in range(6)]
    mute = publish(tmp_path / "mute", [bare])
    silent = replace(cfg, data=replace(cfg.data, dataset=str(mute)))
    with pytest.raises(BadInput, match=r"has no captions, .*no sample has a .txt or a .json"):
        train.run(silent)
    wide = replace(cfg, model=replace(cfg.model, text_width=32))
    with pytest.raises(BadInput, match=r"Give model\.text_width=16"):
        train.run(wide)
    odd = replace(cfg, encoders=replace(cfg.encoders, image_side_px=33))
    with pytest.raises(BadInput, match="Try 32"):
        train.run(odd)
    nowhere = replace(cfg.encoders.text, path=str(tmp_path / "nowhere"))
    with pytest.raises(BadInput, match="which is no folder"):
        train.run(replace(cfg, encoders=replace(cfg.encoders, text=nowhere)))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_captions_in_json_alone_are_captions(tiny_encoder_section, tmp_path):
    told = [
        Sample(each.key, {"png": each.members["png"], "json": b'{"caption": "a red ring"}'})
        for each in map(sample, range(3))
    ]
    dataset = publish(tmp_path / "told", [told])
    cfg = online_config(tmp_path / "run", dataset, tiny_encoder_section)
    assert check_online(cfg, [dataset_of(dataset)])
    with captioned(dataset, side_px=16) as source:
        assert set(load(source, np.arange(3)).captions) == {"a red ring"}


def test_a_run_without_its_record_or_with_a_damaged_one_says_so(
    unencoded, tiny_encoder_section, tmp_path
):
    cfg = online_config(tmp_path, unencoded, tiny_encoder_section)
    with pytest.raises(BadInput, match=f"has no {RECORD}, which says how its latents"):
        latents_of(cfg, tmp_path)
    (tmp_path / RECORD).write_text("{}")
    with pytest.raises(BadInput, match=f"{RECORD} is damaged"):
        latents_of(cfg, tmp_path)
    write_record(tmp_path, Latents("0123456789abcdef", {}))
    with pytest.raises(BadInput, match="trained with encoders of fingerprint 0123456789abcdef"):
        latents_of(cfg, tmp_path)
