"""What no meter knows, and what carbon, cost and facility energy are computed with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from trainer.frozen import config, freeze

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@config
class AccountsConfig:
    """What is stated of the grid, the building and the prices; null is unknown.

    No figure is written that needs what is unknown.
    """

    grid: str | None = None
    """Country whose yearly mean gives the carbon of a kWh: ISO 3166 alpha-3, such as DEU."""
    hourly: Path | None = None
    """Instead of `grid`, a CSV with the columns time (ISO 8601, the begin of an hour, UTC if it has
    no offset), g_co2_per_kwh and perhaps price_per_kwh."""
    pue: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Power usage effectiveness: energy of the whole building over that of its computers."""
    node_overhead_w: Amount = 0.0
    """Watts of a node that none of its meters covers, such as fans and network cards."""
    idle_node_w: Amount | None = None
    """Watts that the meters of a node show without work; null: what they showed when an attempt
    began."""
    price_per_gpu_hour: Amount | None = None
    """Price of one GPU for an hour, in `currency`."""
    price_per_kwh: Amount | None = None
    """Price of a kWh, in `currency`; where `hourly` has prices, those are taken."""
    currency: Annotated[str, Field(pattern=r"^[^\s|]{1,8}$")] = "USD"
    """Of all prices."""

    def __post_init__(self) -> None:
        """Refuse two sources of one number."""
        if self.grid is not None and self.hourly is not None:
            raise ValueError(
                f"grid={self.grid} and hourly={self.hourly} both say how much carbon a kWh is. "
                "Set one of them to null."
            )


@config
class _Stated:
    accounts: AccountsConfig


def stated(section: Mapping[str, Any], changes: Mapping[str, Any]) -> AccountsConfig:
    """Return a run's `accounts`, with changes.

    Args:
        section: As in the run's config.yaml; empty for a run that had none.
        changes: Key by key; None leaves what the run has. A grid replaces an hourly table, and the
            other way around.

    Raises:
        BadInput: A key or a value is impossible.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    replaced = {"grid": None, "hourly": None} if {"grid", "hourly"} & set(given) else {}
    return freeze(_Stated, {"accounts": {**section, **replaced, **given}}).accounts
