"""Every linear map and convolution of a denoiser by name, from its model section, without torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainer.config import ModelConfig, TransformerConfig, UNetConfig
from trainer.config_lora import LoraConfig
from trainer.errors import BadInput

_FREQUENCIES = 256
"""Width of a transformer's sine embedding of the time."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear map, or a convolution."""

    name: str
    inputs: int
    outputs: int
    side: int = 1
    """Of a convolution's square kernel."""


def adapted(cfg: ModelConfig, lora: LoraConfig) -> list[Layer]:
    """List the layers that get an adapter.

    Raises:
        BadInput: A target is no layer's name, nor the end of one; the message lists the names.
    """
    assert isinstance(cfg, UNetConfig | TransformerConfig)
    every = list(layers(cfg))
    for target in lora.targets:
        if not any(_is(layer, target) for layer in every):
            raise BadInput(
                f"lora.targets has {target}, which is no linear map or convolution of this "
                f"{cfg.kind}. Give ends of their names: {', '.join(_ends(every))}."
            )
    return [layer for layer in every if any(_is(layer, target) for target in lora.targets)]


def num_adapter_parameters(cfg: ModelConfig, lora: LoraConfig) -> int:
    """Count the numbers in all adapters.

    Raises:
        BadInput: As `adapted`.
    """
    return sum(
        lora.rank * (layer.inputs * layer.side**2 + layer.outputs) for layer in adapted(cfg, lora)
    )


def layers(cfg: UNetConfig | TransformerConfig) -> Iterator[Layer]:
    """Yield all layers that an adapter can sit on, as diffusers names them."""
    yield from _unet(cfg) if isinstance(cfg, UNetConfig) else _transformer(cfg)


def _unet(cfg: UNetConfig) -> Iterator[Layer]:
    widths, depth = cfg.block_channels, cfg.layers_per_block
    first, time = widths[0], 4 * widths[0]
    last = len(widths) - 1
    yield Layer("conv_in", cfg.latent_channels, first, 3)
    yield Layer("time_embedding.linear_1", first, time)
    yield Layer("time_embedding.linear_2", time, time)
    if cfg.pooled_tokens:
        for name in ("k_proj", "q_proj", "v_proj"):
            yield Layer(f"add_embedding.pool.{name}", cfg.text_width, cfg.text_width)
        yield Layer("add_embedding.proj", cfg.text_width, time)
    for level, width in enumerate(widths):
        inputs = [widths[max(0, level - 1)], *[width] * (depth - 1)]
        yield from _level(f"down_blocks.{level}", cfg, level, inputs)
        if level < last:
            yield Layer(f"down_blocks.{level}.downsamplers.0.conv", width, width, 3)
    yield from _level("mid_block", cfg, last, [widths[-1]] * 2, attentions=1)
    for number, level in enumerate(reversed(range(len(widths)))):
        width, below = widths[level], widths[min(last, level + 1)]
        # Each takes what came from below or before it, and a skip connection.
        skips = [*[width] * depth, widths[max(0, level - 1)]]
        befores = [below, *[width] * depth]
        inputs = [before + skip for before, skip in zip(befores, skips, strict=True)]
        yield from _level(f"up_blocks.{number}", cfg, level, inputs)
        if level > 0:
            yield Layer(f"up_blocks.{number}.upsamplers.0.conv", width, width, 3)
    yield Layer("conv_out", first, cfg.latent_channels, 3)


def _level(
    name: str, cfg: UNetConfig, level: int, inputs: Sequence[int], *, attentions: int | None = None
) -> Iterator[Layer]:
    """Yield residual blocks of so many inputs, and attentions, by default one for each."""
    width, time = cfg.block_channels[level], 4 * cfg.block_channels[0]
    for number, channels in enumerate(inputs):
        block = f"{name}.resnets.{number}"
        yield Layer(f"{block}.conv1", channels, width, 3)
        yield Layer(f"{block}.time_emb_proj", time, width * (1 + cfg.time_scale_shift))
        yield Layer(f"{block}.conv2", width, width, 3)
        if channels != width:
            yield Layer(f"{block}.conv_shortcut", channels, width)
    if attentions is None:
        attentions = len(inputs) if cfg.cross_attention[level] else 0
    for number in range(attentions):
        block = f"{name}.attentions.{number}"
        yield Layer(f"{block}.proj_in", width, width)
        yield from _attending(f"{block}.transformer_blocks.0", width, cfg.text_width, gates=2)
        yield Layer(f"{block}.proj_out", width, width)


def _transformer(cfg: TransformerConfig) -> Iterator[Layer]:
    width, patch = cfg.num_heads * cfg.head_width, cfg.patch_side
    yield Layer("pos_embed.proj", cfg.latent_channels, width, patch)
    yield Layer("adaln_single.emb.timestep_embedder.linear_1", _FREQUENCIES, width)
    yield Layer("adaln_single.emb.timestep_embedder.linear_2", width, width)
    yield Layer("adaln_single.linear", width, 6 * width)
    yield Layer("caption_projection.linear_1", cfg.text_width, width)
    yield Layer("caption_projection.linear_2", width, width)
    for number in range(cfg.num_layers):
        yield from _attending(f"transformer_blocks.{number}", width, width, gates=1)
    # diffusers' PixArt predicts a mean alone where inputs and outputs have equally many channels.
    yield Layer("proj_out", width, patch**2 * cfg.latent_channels)


def _attending(block: str, width: int, text_width: int, *, gates: int) -> Iterator[Layer]:
    for attention, states in (("attn1", width), ("attn2", text_width)):
        yield Layer(f"{block}.{attention}.to_q", width, width)
        yield Layer(f"{block}.{attention}.to_k", states, width)
        yield Layer(f"{block}.{attention}.to_v", states, width)
        yield Layer(f"{block}.{attention}.to_out.0", width, width)
    yield Layer(f"{block}.ff.net.0.proj", width, gates * 4 * width)
    yield Layer(f"{block}.ff.net.2", 4 * width, width)


def _is(layer: Layer, target: str) -> bool:
    return layer.name == target or layer.name.endswith(f".{target}")


def _ends(every: Sequence[Layer]) -> list[str]:
    """Shorten names to their last part, or to the last two where that is a number."""
    parts = (layer.name.split(".") for layer in every)
    ends = (name[-2:] if name[-1].isdigit() else name[-1:] for name in parts)
    return list(dict.fromkeys(".".join(end) for end in ends))
