"""What LoRA may be told: how large the adapters are, and on which maps they sit."""

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from trainer.frozen import config


@config
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): W + alpha / rank B A learns B and A; W stays.

    There is no dropout of adapters: its draws would depend on ranks and restarts.
    """

    rank: PositiveInt
    """Rows of A and columns of B."""
    alpha: PositiveFloat
    """The product is scaled by alpha / rank."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    """Ends of names of linear maps and convolutions, whole parts: to_q is every such map."""
