"""What one image costs a network, from its model section alone, without torch.

Sides are those of the latent. For an autoencoder they stand for the picture that has such a
latent, of that many pixels times its downscale, which is encoded and decoded; it has no text
(`text_tokens=0`). What lies outside the network is not counted: losses, the networks that they
need, and an autoencoder's discriminator.
"""

from dataclasses import dataclass

from trainer.config import ModelConfig
from trainer.config_lora import LoraConfig
from trainer.models.layers import adapted
from trainer.models.networks import run
from trainer.models.tape import Adapters, Tape


def forward_flops(
    cfg: ModelConfig, *, latent_height: int, latent_width: int, text_tokens: int
) -> int:
    """Count a forward pass: 2 x the multiply-adds of layers and attentions, as PyTorch counts.

    Raises:
        BadInput: The numbers of the model section contradict each other.
    """
    tape = Tape()
    run(cfg, tape, latent_height, latent_width, text_tokens)
    return tape.forward_flops


def training_flops(
    cfg: ModelConfig,
    *,
    latent_height: int,
    latent_width: int,
    text_tokens: int,
    lora: LoraConfig | None = None,
) -> int:
    """Count a forward and a backward pass; recomputed activations are not the model's.

    A backward pass is twice the forward one: one product for the gradients of inputs, one for
    those of weights. With adapters it has the products alone that lead to them.

    Raises:
        BadInput: As `forward_flops`; or adapters should sit where the network has no layer.
    """
    if lora is None:
        return 3 * forward_flops(
            cfg, latent_height=latent_height, latent_width=latent_width, text_tokens=text_tokens
        )
    tape = Tape(adapters=_adapters(cfg, lora))
    run(cfg, tape, latent_height, latent_width, text_tokens)
    return tape.forward_flops + tape.backward_flops


def activation_bytes(
    cfg: ModelConfig,
    *,
    latent_height: int,
    latent_width: int,
    text_tokens: int,
    width_bytes: int,
    checkpointing: bool,
    lora: LoraConfig | None = None,
) -> int:
    """Count the bytes that autograd keeps for the backward pass, per image of a micro-batch.

    With checkpointing it is the most at a time: inputs of blocks, and what one of them keeps while
    it is computed again. Temporaries of the backward pass come on top, in bf16 2 % for unet_sd2
    (12 % with checkpointing) and 0.3 % for transformer_xl (2.5 %); and what an allocator wastes.

    Args:
        cfg: Of the network.
        latent_height: Rows of the latent.
        latent_width: Columns of the latent.
        text_tokens: Of the longest caption of a micro-batch.
        width_bytes: Of a number in the network's precision: 4 in fp32, 2 in bf16 and fp16.
        checkpointing: `engine.activation_checkpointing`.
        lora: The adapters, if they alone are trained.

    Raises:
        BadInput: As `forward_flops`; or adapters should sit where the network has no layer.
    """
    adapters = None if lora is None else _adapters(cfg, lora)
    tape = Tape(width_bytes=width_bytes, recomputes=checkpointing, adapters=adapters)
    run(cfg, tape, latent_height, latent_width, text_tokens)
    return tape.most_kept_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A point of the backward pass, in front of the gradients of a layer."""

    kept_bytes: int
    """Per image of a micro-batch: activations that are still needed."""
    num_gradients: int
    """Weights behind it, whose gradients are there."""


def backward_moments(
    cfg: ModelConfig,
    *,
    latent_height: int,
    latent_width: int,
    text_tokens: int,
    width_bytes: int,
    checkpointing: bool,
) -> list[Moment]:
    """Follow a backward pass from its begin, where nothing has a gradient, to its end.

    While activations are freed, gradients come; neither is there in full when the other is. Of the
    weights those of layers are counted, which are nearly all.

    Raises:
        BadInput: As `forward_flops`.
    """
    tape = Tape(width_bytes=width_bytes, recomputes=checkpointing)
    run(cfg, tape, latent_height, latent_width, text_tokens)
    found = [Moment(kept_bytes=tape.most_kept_bytes, num_gradients=0)]
    behind = 0
    for layer, kept_bytes in zip(
        reversed(tape.layers), reversed(tape.kept_bytes_by_layer), strict=True
    ):
        behind += layer.inputs * layer.outputs * layer.side**2
        found.append(Moment(kept_bytes=kept_bytes, num_gradients=behind))
    return found


def _adapters(cfg: ModelConfig, lora: LoraConfig) -> Adapters:
    return Adapters(frozenset(layer.name for layer in adapted(cfg, lora)), lora.rank)
