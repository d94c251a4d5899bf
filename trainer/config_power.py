"""What `kiln power-sweep` may be told: a training run, and the power limits to try it under."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.config import TrainConfig
from trainer.frozen import config


@config
class PowerSweepConfig(TrainConfig):
    """`kiln power-sweep`."""

    watts: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """Power limits of one GPU to try, besides none."""
    steps: PositiveInt
    """Steps that are measured under each, at least."""
    warmup_steps: NonNegativeInt
    """Steps before that, under each."""
    window_s: PositiveFloat
    """Seconds that are measured under each, at least; counters move about ten times a second."""
