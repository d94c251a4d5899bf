"""Small random networks for adapters to sit on, of both families, as folders of diffusers."""

from tests.exports import UNET, random_denoiser
from trainer.config import TransformerConfig, UNetConfig
from trainer.frozen import freeze

TRANSFORMER = {
    "kind": "transformer",
    "latent_channels": 4,
    "latent_side": 8,
    "text_width": 16,
    "patch_side": 2,
    "num_layers": 1,
    "num_heads": 2,
    "head_width": 8,
    "num_parameters": 10_000,
}
BASES = {
    "unet": {
        **UNET,
        "latent_side": 8,
        "block_channels": [8],
        "cross_attention": [True],
        "head_width": [8],
        "pooled_tokens": 32,
        "num_parameters": 20_000,
    },
    "transformer": TRANSFORMER,
}
# 3 divides no width, so that shards are uneven; alpha is not the rank; a convolution is among them.
LORA = {"rank": 3, "alpha": 4.5, "targets": ["to_q", "to_out.0"]}
CONVOLUTIONS = {"unet": ["conv1"], "transformer": ["pos_embed.proj", "proj_out"]}


def section(data):
    """Freeze a model section."""
    return freeze(UNetConfig if data["kind"] == "unet" else TransformerConfig, data)


def save_base(data, folder):
    """Save a random network into a folder and return it."""
    denoiser = random_denoiser(section(data))
    denoiser.inner.save_pretrained(folder / data["kind"])
    return denoiser


def lora_keys(kind, folder):
    """Config keys of a run that adapts such a folder's network."""
    lora = {**LORA, "targets": [*LORA["targets"], *CONVOLUTIONS[kind]]}
    # While B is zero A has no gradient, and Adam's eps must not make steps of its rounding.
    return {"model": BASES[kind], "start_from": str(folder), "lora": lora, "optim.eps": 1e-3}
