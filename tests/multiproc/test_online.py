"""Real trainings that encode while they train, beside one on what `kiln encode` wrote."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.forked import run_forked
from tests.multiproc.toys import assert_equal, everything, interrupted, log, losses
from tests.tiny_dataset import scenes_dataset
from tests.tiny_encoders import save_kl
from tests.tiny_run import denoiser_config, encode_dataset, tiny_encoder_config
from trainer import train
from trainer.encoded import RECORD
from trainer.errors import BadInput
from trainer.observe.jsonl import read_rows
from trainer.runtime.compiled import build_cpu_op
from trainer.runtime.rundir import freeze_config
from trainer.worker import work

pytestmark = pytest.mark.multiproc
STEPS, SAVE_AT = 4, 2
SETTINGS = {
    "total_images": STEPS * 8,
    "batch__micro_batch_images": 4,
    "checkpoint__every_images": SAVE_AT * 8,
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return tiny_encoder_config(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, encoders):
    build_cpu_op()
    dataset = scenes_dataset(tmp_path_factory.mktemp("data") / "scenes")
    encode_dataset(dataset, encoders)
    return dataset


def config(run, dataset, encoders, latents, *, world=1, **changes):
    settings = SETTINGS | changes
    return denoiser_config(
        run, dataset, encoders, data__latents=latents, cluster__ranks_per_node=world, **settings
    )


def trained(cfg, *, code=0):
    """Train as ranks do; returns the run's folder and its losses."""
    run, world = Path(cfg.run), cfg.cluster.ranks_per_node
    run.mkdir(exist_ok=True)
    freeze_config(run, cfg)
    codes = run_forked(work, run, num_ranks=world, log_dir=run)
    assert codes == [code] * world, log(run)
    return run, losses(run)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset, encoders):
    """Uninterrupted runs by (latents, ranks): folder and losses."""
    root = tmp_path_factory.mktemp("runs")
    return {
        (latents, world): trained(
            config(root / f"{latents}{world}", dataset, encoders, latents, world=world)
        )
        for latents, world in (("encoded", 1), ("online", 1), ("online", 2))
    }


def test_adapters_learn_alike_from_what_is_encoded_meanwhile(runs, tmp_path, dataset, encoders):
    adapters = {
        "start_from": str(runs["encoded", 1][0]),
        "lora": {"rank": 2, "alpha": 2.0, "targets": ["to_q", "to_v"]},
    }
    before, meanwhile = (
        trained(config(tmp_path / latents, dataset, encoders, latents, **adapters))[1]
        for latents in ("encoded", "online")
    )
    assert meanwhile == pytest.approx(before, rel=2e-3)


@pytest.mark.parametrize("world", [1, 2])
def test_every_step_has_the_loss_that_encoded_latents_give(runs, world):
    expected, found = runs["encoded", 1][1], runs["online", world][1]
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=2e-3)


def test_no_tensor_of_an_encoder_is_trained_averaged_or_saved(runs):
    online, record = everything(runs["online", 1][0])
    encoded, their_record = everything(runs["encoded", 1][0])
    assert {name: len(t) for name, t in online.items()} == {
        name: len(t) for name, t in encoded.items()
    }
    assert record.state.encoding_fingerprint == their_record.state.encoding_fingerprint != ""


def test_interrupted_equals_uninterrupted_bit_for_bit(runs, tmp_path, dataset, encoders):
    """Also when the dataset's encoding goes meanwhile: the run remembers its normalisation."""
    whole, expected = runs["online", 1]
    again = interrupted(whole, tmp_path / "again", SAVE_AT)
    shutil.copy(whole / RECORD, again / RECORD)
    bare = shutil.copytree(dataset, tmp_path / "bare", ignore=shutil.ignore_patterns("encodings"))
    run, found = trained(config(again, bare, encoders, "online"))
    assert found == expected[SAVE_AT:]
    assert_equal(run, whole, exact=True)


def test_what_encoding_takes_is_an_account_of_its_own(runs):
    for latents in ("online", "encoded"):
        run = runs[latents, 1][0]
        seconds = sum(
            row["seconds"] for row in read_rows(run / "ledger.jsonl") if row["bucket"] == "encoding"
        )
        told = [row["time/encoding_s"] for row in metrics(run) if "time/encoding_s" in row]
        assert (seconds > 0) == (latents == "online") == bool(told)
        assert sum(told) == pytest.approx(seconds, rel=0.1, abs=1e-3)


def metrics(run):
    return read_rows(run / "metrics.jsonl")


def test_other_encoders_at_resume_are_refused(runs, tmp_path, dataset, encoders):
    """At the same path, so that the config does not tell; by the command, and by its ranks."""
    kl = save_kl(tmp_path / "kl")
    mine = replace(encoders, autoencoder=replace(encoders.autoencoder, path=str(kl)))
    cfg = config(tmp_path / "run", dataset, mine, "online", total_images=16)
    run, _ = trained(cfg)
    remembered = (run / RECORD).read_bytes()
    weights = kl / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    longer = replace(cfg, total_images=24)
    with pytest.raises(BadInput, match=r"trained with encoders of fingerprint .* files changed"):
        train.run(longer)
    freeze_config(run, longer)
    run_forked(work, run, num_ranks=1, log_dir=run)
    assert "files changed" in log(run)
    assert (run / RECORD).read_bytes() == remembered
    other = replace(longer, data=replace(longer.data, latents="encoded"))
    with pytest.raises(BadInput, match=r'data.latents: "online" -> "encoded"'):
        freeze_config(run, other)


def test_a_run_that_lost_its_normalisation_does_not_go_on(runs, tmp_path, dataset, encoders):
    """Another one would silently scale what a trained network reads."""
    again = interrupted(runs["online", 1][0], tmp_path / "again", SAVE_AT)
    cfg = config(again, dataset, encoders, "online")
    with pytest.raises(BadInput, match=f"has no {RECORD}, which says how its latents"):
        train.run(cfg)
    freeze_config(again, cfg)
    run_forked(work, again, num_ranks=2, log_dir=again)
    assert f"has no {RECORD}" in log(again)
    assert not (again / RECORD).exists()
