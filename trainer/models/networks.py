"""The forward passes of all networks, as diffusers computes them, on shapes and without torch."""

from dataclasses import dataclass

from trainer.config import AutoencoderModelConfig, ModelConfig, TransformerConfig, UNetConfig
from trainer.models.sections import check_section
from trainer.models.tape import Array, Tape

_FREQUENCIES = 256
"""Width of a transformer's sine embedding of the time."""


def run(
    cfg: ModelConfig, tape: Tape, latent_height: int, latent_width: int, text_tokens: int
) -> None:
    """Run one image through a network.

    Args:
        cfg: Of the network.
        tape: Notes what it costs.
        latent_height: Rows of the latent. An autoencoder encodes and decodes the picture of it.
        latent_width: Columns of the latent.
        text_tokens: Of the longest caption of its batch; none for an autoencoder.

    Raises:
        BadInput: The numbers of the model section contradict each other.
    """
    if isinstance(cfg, AutoencoderModelConfig):
        downscale = 2 ** (len(cfg.block_channels) - 1)
        _autoencoder(tape, cfg, Array(3, latent_height * downscale, latent_width * downscale))
        return
    check_section(cfg)
    latent = Array(cfg.latent_channels, latent_height, latent_width)
    if isinstance(cfg, UNetConfig):
        _unet(tape, cfg, latent, max(text_tokens, cfg.pooled_tokens))
    else:
        _transformer(tape, cfg, latent, text_tokens)


def pooling_heads(cfg: UNetConfig) -> int:
    """Return how many heads pool a caption."""
    return max(1, cfg.text_width // 96)


@dataclass(frozen=True, slots=True)
class _Text:
    states: Array
    mask: Array
    """Over the tokens; each attention makes one of its own per head."""


def _text(states: Array) -> _Text:
    return _Text(states, Array(1, states.rows))


def _unet(tape: Tape, cfg: UNetConfig, latent: Array, text_tokens: int) -> None:
    widths, depth = cfg.block_channels, cfg.layers_per_block
    last = len(widths) - 1
    text = _text(Array(cfg.text_width, text_tokens))
    time = _mlp(tape, "time_embedding", Array(widths[0]), 4 * widths[0])
    if cfg.pooled_tokens:
        time = tape.add(time, _pooled(tape, cfg, text.states, time.channels))
    x = tape.conv("conv_in", latent, widths[0])
    skips = [x]
    for level, width in enumerate(widths):
        block = f"down_blocks.{level}"
        for number in range(depth):
            with tape.recomputed(x, time):
                x = _residual(tape, f"{block}.resnets.{number}", cfg, x, width, time)
            if cfg.cross_attention[level]:
                x = _attend(tape, f"{block}.attentions.{number}", cfg, level, x, text)
            skips.append(x)
        if level < last:
            x = tape.conv(f"{block}.downsamplers.0.conv", x, width, stride=2)
            skips.append(x)
    # diffusers recomputes the second residual block alone.
    x = _residual(tape, "mid_block.resnets.0", cfg, x, widths[-1], time)
    x = _attend(tape, "mid_block.attentions.0", cfg, last, x, text)
    with tape.recomputed(x, time):
        x = _residual(tape, "mid_block.resnets.1", cfg, x, widths[-1], time)
    for up, level in enumerate(reversed(range(len(widths)))):
        block = f"up_blocks.{up}"
        for number in range(depth + 1):
            x = tape.concatenate(x, skips.pop())
            with tape.recomputed(x, time):
                x = _residual(tape, f"{block}.resnets.{number}", cfg, x, widths[level], time)
            if cfg.cross_attention[level]:
                x = _attend(tape, f"{block}.attentions.{number}", cfg, level, x, text)
        if level > 0:
            x = tape.resize(x, skips[-1].rows, skips[-1].columns)
            x = tape.conv(f"{block}.upsamplers.0.conv", x, widths[level])
    x = tape.activation(tape.norm(x, groups=cfg.norm_groups))
    tape.conv("conv_out", x, cfg.latent_channels)


def _mlp(tape: Tape, name: str, x: Array, width: int) -> Array:
    x = tape.activation(tape.linear(f"{name}.linear_1", x, width))
    return tape.linear(f"{name}.linear_2", x, width)


def _pooled(tape: Tape, cfg: UNetConfig, states: Array, outputs: int) -> Array:
    """Let the mean of a caption's states attend to them all."""
    width = cfg.text_width
    states = tape.norm(states)
    mean = tape.with_weight(Array(width, has_grad=states.has_grad))
    states = tape.resize(states, states.rows + 1, 1)
    q = tape.linear("add_embedding.pool.q_proj", mean, width)
    k = tape.copy(tape.linear("add_embedding.pool.k_proj", states, width))
    v = tape.copy(tape.linear("add_embedding.pool.v_proj", states, width))
    y = tape.plain_attention(q, k, v, heads=pooling_heads(cfg))
    return tape.norm(tape.linear("add_embedding.proj", y, outputs))


def _residual(
    tape: Tape,
    name: str,
    cfg: UNetConfig | AutoencoderModelConfig,
    x: Array,
    width: int,
    time: Array | None = None,
) -> Array:
    groups = cfg.norm_groups
    y = tape.activation(tape.norm(x, groups=groups))
    y = tape.conv(f"{name}.conv1", y, width)
    if time is None:
        y = tape.norm(y, groups=groups)
    else:
        assert isinstance(cfg, UNetConfig)
        proj, time = f"{name}.time_emb_proj", tape.activation(time)
        if cfg.time_scale_shift:
            shifts = tape.linear(proj, time, 2 * width)
            scale = tape.part(shifts, width)
            y = tape.add(tape.multiply(tape.norm(y, groups=groups), scale), shifts)
        else:
            y = tape.norm(tape.add(y, tape.linear(proj, time, width)), groups=groups)
    y = tape.conv(f"{name}.conv2", tape.activation(y), width)
    if x.channels != width:
        x = tape.conv(f"{name}.conv_shortcut", x, width, side=1, padding=0)
    return tape.add(x, y)


def _attend(tape: Tape, name: str, cfg: UNetConfig, level: int, x: Array, text: _Text) -> Array:
    """Attend from positions to each other, and to the text."""
    width = cfg.block_channels[level]
    heads = width // cfg.head_width[level]
    y = tape.copy(tape.norm(x, groups=cfg.norm_groups))
    y = tape.copy(tape.linear(f"{name}.proj_in", y, width))
    block = f"{name}.transformer_blocks.0"
    with tape.recomputed(y, text.states, text.mask):
        z = tape.norm(y)
        y = tape.add(y, _attention(tape, f"{block}.attn1", z, z, heads))
        z = tape.norm(y)
        y = tape.add(y, _attention(tape, f"{block}.attn2", z, text.states, heads, text))
        z = tape.linear(f"{block}.ff.net.0.proj", tape.norm(y), 8 * width)
        # One half of it gates the other.
        z = tape.multiply(tape.activation(z, channels=4 * width), z)
        y = tape.add(y, tape.linear(f"{block}.ff.net.2", z, width))
    return tape.add(x, tape.copy(tape.linear(f"{name}.proj_out", y, width)))


def _attention(
    tape: Tape, name: str, x: Array, states: Array, heads: int, text: _Text | None = None
) -> Array:
    width = x.channels
    q = tape.linear(f"{name}.to_q", x, width)
    k = tape.linear(f"{name}.to_k", states, width)
    v = tape.linear(f"{name}.to_v", states, width)
    mask = None if text is None else Array(heads, text.mask.rows)
    y = tape.attention(q, k, v, heads=heads, mask=mask)
    return tape.copy(tape.linear(f"{name}.to_out.0", y, width))


def _transformer(tape: Tape, cfg: TransformerConfig, latent: Array, text_tokens: int) -> None:
    width, patch = cfg.num_heads * cfg.head_width, cfg.patch_side
    x = tape.conv("pos_embed.proj", latent, width, side=patch, stride=patch, padding=0)
    x = tape.copy(x)
    time = _mlp(tape, "adaln_single.emb.timestep_embedder", Array(_FREQUENCIES), width)
    shifts = tape.linear("adaln_single.linear", tape.activation(time), 6 * width)
    states = _mlp(tape, "caption_projection", Array(cfg.text_width, text_tokens), width)
    text = _text(states)
    for number in range(cfg.num_layers):
        with tape.recomputed(x, text.states, text.mask, shifts):
            x = _block(tape, f"transformer_blocks.{number}", cfg, x, text, shifts)
    x = _modulated(tape, x, tape.with_weight(tape.copy(time)))
    # diffusers' PixArt predicts a mean alone where inputs and outputs have equally many channels.
    tape.linear("proj_out", x, patch**2 * cfg.latent_channels)


def _block(
    tape: Tape, name: str, cfg: TransformerConfig, x: Array, text: _Text, shifts: Array
) -> Array:
    heads, width = cfg.num_heads, x.channels
    shifts = tape.with_weight(shifts)
    y = _modulated(tape, x, shifts)
    y = _attention(tape, f"{name}.attn1", y, y, heads)
    x = tape.add(x, tape.multiply(y, shifts))
    x = tape.add(x, _attention(tape, f"{name}.attn2", x, text.states, heads, text))
    y = tape.linear(f"{name}.ff.net.0.proj", _modulated(tape, x, shifts), 4 * width)
    y = tape.linear(f"{name}.ff.net.2", tape.activation(y), width)
    return tape.add(x, tape.multiply(y, shifts))


def _modulated(tape: Tape, x: Array, shifts: Array) -> Array:
    scale = tape.part(shifts, x.channels)
    return tape.add(tape.multiply(tape.norm(x), scale), shifts)


def _autoencoder(tape: Tape, cfg: AutoencoderModelConfig, picture: Array) -> None:
    _decode(tape, cfg, _draw(tape, _encode(tape, cfg, picture)))


def _encode(tape: Tape, cfg: AutoencoderModelConfig, picture: Array) -> Array:
    """Return means and log-variances."""
    widths, moments = cfg.block_channels, 2 * cfg.latent_channels
    x = tape.conv("encoder.conv_in", picture, widths[0])
    for level, width in enumerate(widths):
        block = f"encoder.down_blocks.{level}"
        with tape.recomputed(x):
            for number in range(cfg.layers_per_block):
                x = _residual(tape, f"{block}.resnets.{number}", cfg, x, width)
            if level < len(widths) - 1:
                x = tape.resize(x, x.rows + 1, x.columns + 1)
                x = tape.conv(f"{block}.downsamplers.0.conv", x, width, stride=2, padding=0)
    x = _middle(tape, "encoder", cfg, x)
    x = tape.activation(tape.norm(x, groups=cfg.norm_groups))
    x = tape.conv("encoder.conv_out", x, moments)
    return tape.conv("quant_conv", x, moments, side=1, padding=0)


def _draw(tape: Tape, moments: Array) -> Array:
    """Return means plus noise times deviations, which are kept: roots of exponentials."""
    std = tape.part(moments, moments.channels // 2)
    noise = Array(std.channels, std.rows, std.columns)
    tape.keep(moments, std)
    return tape.multiply(std, noise)


def _decode(tape: Tape, cfg: AutoencoderModelConfig, latent: Array) -> None:
    widths = cfg.block_channels
    x = tape.conv("post_quant_conv", latent, latent.channels, side=1, padding=0)
    x = tape.conv("decoder.conv_in", x, widths[-1])
    x = _middle(tape, "decoder", cfg, x)
    for up, level in enumerate(reversed(range(len(widths)))):
        block = f"decoder.up_blocks.{up}"
        with tape.recomputed(x):
            for number in range(cfg.layers_per_block + 1):
                x = _residual(tape, f"{block}.resnets.{number}", cfg, x, widths[level])
            if level > 0:
                x = tape.resize(x, 2 * x.rows, 2 * x.columns)
                x = tape.conv(f"{block}.upsamplers.0.conv", x, widths[level])
    x = tape.activation(tape.norm(x, groups=cfg.norm_groups))
    tape.conv("decoder.conv_out", x, 3)


def _middle(tape: Tape, coder: str, cfg: AutoencoderModelConfig, x: Array) -> Array:
    name, width = f"{coder}.mid_block", x.channels
    with tape.recomputed(x):
        x = _residual(tape, f"{name}.resnets.0", cfg, x, width)
        if cfg.mid_attention:
            # Channels come first, so that each of the maps copies what it reads.
            y = tape.norm(x, groups=cfg.norm_groups)
            q, k, v = (
                tape.linear(f"{name}.attentions.0.to_{letter}", tape.copy(y), width)
                for letter in "qkv"
            )
            y = tape.attention(q, k, v, heads=1)
            x = tape.add(x, tape.linear(f"{name}.attentions.0.to_out.0", y, width))
        with tape.recomputed(x):
            return _residual(tape, f"{name}.resnets.1", cfg, x, width)
