"""What a launch line may say of when its job begins: a frozen dataclass."""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainer.frozen import config


@config
class StartConfig:
    """When a job begins. It is of the job: the run does not know of it, and never changes by it."""

    by: Literal["carbon", "price"] | None = None
    """carbon, price: at the full hour from which the run takes the least of it, by `hourly`; null
    begins at once."""
    hourly: Path | None = None
    """A table as for accounts.hourly, which is taken where this is null: a forecast."""
    deadline: datetime | None = None
    """The run must be over by then, such as 2026-12-01T08:00; local time if it has no offset."""
    hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """How long the run takes, of a sweep all its runs; null is the walltime of the job."""

    def __post_init__(self) -> None:
        """Refuse a wish of which a part is missing."""
        given = [
            f"{name}={value}"
            for name, value in (
                ("hourly", self.hourly),
                ("deadline", self.deadline),
                ("hours", self.hours),
            )
            if value is not None
        ]
        if self.by is None and given:
            raise ValueError(
                f"got {', '.join(given)}, and by is null, which begins at once. Give start.by="
                "carbon or start.by=price, or leave these out."
            )
        if self.by is not None and self.deadline is None:
            raise ValueError(
                f"by={self.by} needs to know how long it may wait. Give start.deadline=, such as "
                "2026-12-01T08:00, by which the run must be over."
            )
