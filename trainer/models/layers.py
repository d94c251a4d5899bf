"""Every linear map and convolution of a denoiser by name, from its model section, without torch."""

from collections.abc import Sequence

from trainer.config import ModelConfig, TransformerConfig, UNetConfig
from trainer.config_lora import LoraConfig
from trainer.errors import BadInput
from trainer.models.networks import run
from trainer.models.tape import Layer, Tape


def adapted(cfg: ModelConfig, lora: LoraConfig) -> list[Layer]:
    """List the layers that get an adapter.

    Raises:
        BadInput: A target is no layer's name, nor the end of one; the message lists the names. Or
            the numbers of the model section contradict each other.
    """
    assert isinstance(cfg, UNetConfig | TransformerConfig)
    every = layers(cfg)
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


def layers(cfg: UNetConfig | TransformerConfig) -> list[Layer]:
    """List all layers that an adapter can sit on, as diffusers names them, as they run."""
    tape = Tape()
    run(cfg, tape, cfg.latent_side, cfg.latent_side, text_tokens=1)
    return tape.layers


def _is(layer: Layer, target: str) -> bool:
    return layer.name == target or layer.name.endswith(f".{target}")


def _ends(every: Sequence[Layer]) -> list[str]:
    """Shorten names to their last part, or to the last two where that is a number."""
    parts = (layer.name.split(".") for layer in every)
    ends = (name[-2:] if name[-1].isdigit() else name[-1:] for name in parts)
    return list(dict.fromkeys(".".join(end) for end in ends))
