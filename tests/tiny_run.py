"""A run directory with a checkpoint, made without training: the weights are given."""

from dataclasses import replace
from pathlib import Path

import torch

from data_prep import encode
from data_prep.config import EncodeConfig
from tests import tiny_encoders
from tests.tiny import tiny_config
from trainer.config import EncodersConfig
from trainer.data.manifest import list_encodings, load_manifest
from trainer.frozen import freeze, write_yaml
from trainer.observe.jsonl import JsonLines
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.fragments import Fragment
from trainer.runtime.saver import Saver
from trainer.runtime.snapshot import Snapshot

SIDE_PX = 32
MOMENTS = ("exp_avg", "exp_avg_sq")


class OneRank:
    """What a saver asks of the other ranks, when there are none."""

    rank, world = 0, 1

    def sum(self, values):
        return list(values)

    def from_rank_0(self, value):
        return value

    def gather_bytes(self, content):
        return [content]


class WholeTensors:
    """Fragments and averages of a model that one rank holds whole; the live weights are zero."""

    def __init__(self, weights, **more):
        """Take the first average, which is called ema, and others by name."""
        self.shapes = {name: list(value.shape) for name, value in weights.items()}
        self.averages = {
            average: [value.detach().float().flatten().clone() for value in values.values()]
            for average, values in {"ema": weights, **more}.items()
        }
        self._live = {
            name: (torch.zeros_like(flat), {key: torch.zeros_like(flat) for key in MOMENTS})
            for name, flat in zip(weights, self.averages["ema"], strict=True)
        }

    def __iter__(self):
        for name, (flat, moments) in self._live.items():
            yield Fragment(name, 0, flat.numel(), flat, moments)

    def scalars(self):
        return {"steps": 1.0}

    def set_scalars(self, scalars):
        assert scalars == self.scalars()

    def publish(self):
        pass

    def tensors(self):
        return self.averages


def write_checkpoint(root, state, whole, **policy):
    """Save and wait; returns whether it worked."""
    if not isinstance(whole, WholeTensors):
        whole = WholeTensors(whole)
    saver = Saver(
        root,
        Snapshot(whole, whole),
        OneRank(),
        replace(tiny_config().checkpoint, **policy),
        attempt=0,
        shapes=whole.shapes,
        averages=list(whole.averages),
    )
    saver.save(state)
    return saver.finish()


def tiny_encoder_config(folder):
    """Save tiny encoders into a folder and return their section of the config."""
    kl, t5 = (tiny_encoders.save_kl(folder / "kl"), tiny_encoders.save_t5(folder / "t5"))
    data = {
        "autoencoder": {"kind": "kl", "path": str(kl)},
        "text": {
            "kind": "t5",
            "path": str(t5),
            "subfolder": "",
            "tokenizer_subfolder": "",
            "max_tokens": 32,
        },
        "image_side_px": SIDE_PX,
    }
    return freeze(EncodersConfig, data)


def encode_dataset(dataset, encoders):
    cfg = EncodeConfig(
        dataset=dataset,
        encoders=encoders,
        batch_images=8,
        batch_tokens=64,
        threads=1,
        decode_threads=1,
        device="cpu",
        probe_s=0.0,
        dry_run=False,
        parts=1,
        part=0,
        recheck="sizes",
        wandb="off",
        wandb_project="kiln",
        tdp_w_per_core=7.0,
    )
    assert encode.run(cfg) == 0


def denoiser_config(run, dataset, encoders, **changes):
    cfg = tiny_config(
        run=str(run),
        data__dataset=str(dataset),
        model__latent_side=SIDE_PX // 2,
        model__patch_side=4,
        **changes,
    )
    return replace(cfg, encoders=encoders)


def save_run(cfg, run, model, **options):
    """Write config, metrics and one checkpoint whose averages are the model's weights."""
    run.mkdir(parents=True)
    write_yaml(cfg, run / "config.yaml")
    save_checkpoint(cfg, run, model, step=8, **options)
    rows = JsonLines(run / "metrics.jsonl")
    rows.append([{"step": n, "images_seen": 8 * n, "train/loss": 1 / n} for n in range(1, 9)])
    rows.close()
    return run


def save_checkpoint(cfg, run, model, *, step, keep_last=9, encoding=None):
    """Save a checkpoint after `step` steps of 8 images; `encoding` is another fingerprint."""
    weights = {name: param for name, param in model.named_parameters() if param.requires_grad}
    dataset = Path(cfg.data.dataset)
    manifest = load_manifest(dataset)
    encodings = list_encodings(dataset) if cfg.reads_latents else []
    state = TrainState(
        step=step,
        images_seen=8 * step,
        seed=cfg.seed,
        dataset_fingerprint=manifest.fingerprint,
        encoding_fingerprint=encoding or (encodings[0].fingerprint if encodings else ""),
        stream={},
    )
    assert write_checkpoint(run / "checkpoints", state, weights, keep_last=keep_last)
