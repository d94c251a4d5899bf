"""Derive an account's figures: joules per image, what was lost, and all of it in CO2 and money."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config_accounts import AccountsConfig
from trainer.observe.accounts import Total, combined, lost_work, totals
from trainer.observe.carbon import Rate
from trainer.observe.idle import idle_of
from trainer.observe.ledger import Bucket
from trainer.observe.merging import period_ends, writer_of

J_PER_KWH = 3.6e6
_S_PER_HOUR = 3600.0
_TRAIN = "train"
_DATA = ("plan", "prepare", "encode")
_CLOCK = {"clock": 1.0}
_MODELS: Mapping[str, str] = {
    "tdp_model": "tdp_model: busy core-seconds x stated watts, without idle power, memory, board",
    "limit_model": "limit_model: a GPU that shows nothing draws its power limit all the time",
}

Rows = Sequence[Mapping[str, Any]]
_Sums = Mapping[tuple[str, Bucket], Total]


@dataclass(frozen=True)
class Figure:
    """One number, and what it rests on."""

    key: str
    """For programs."""
    name: str
    """For people."""
    value: float
    unit: str
    """`frac` for a share."""
    known_by: Mapping[str, float]
    """Shares of the joules behind it by provenance, or `stated`; of seconds all are `clock`."""
    assumptions: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What follows from an account; a figure whose input is unknown is not there."""

    by_bucket: Mapping[tuple[str, Bucket], Total]
    """Seconds and joules by stage and bucket."""
    by_key: Mapping[str, Figure]
    """In the order in which they are told."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the account was spent on, and where."""

    images: int
    """Trained on, and in the result."""
    kept_samples: int = 0
    """Of the dataset; 0 where that is unknown."""
    num_nodes: int = 1
    """That train."""
    num_gpus: int = 0
    """That train, on all nodes together."""


def work_on(cluster: Mapping[str, Any], *, images: int, kept_samples: int) -> Work:
    """Say what came of a run on the `cluster` of its config; an empty one is a node, no GPU."""
    num_nodes = cluster.get("num_nodes", 1)
    num_gpus = num_nodes * cluster["ranks_per_node"] if cluster.get("device") == "cuda" else 0
    return Work(images=images, kept_samples=kept_samples, num_nodes=num_nodes, num_gpus=num_gpus)


def derive(
    rows: Rows,
    work: Work,
    stated: AccountsConfig,
    *,
    carbon: Rate | None = None,
    price: Rate | None = None,
) -> Figures:
    """Derive all figures whose input is there.

    Args:
        rows: Of the dataset's ledgers and of the run's, each in the order it was written.
        work: What came of it.
        stated: What no meter knows.
        carbon: Grams of CO2 per kWh; None is unknown.
        price: Money per kWh; None is unknown.

    Raises:
        BadInput: A table of hours lacks one in which energy was spent.
    """
    sums = totals(rows)
    caveats = _caveats(rows, work)
    found = (
        *_energy(sums, caveats),
        *_per_image(sums, work, caveats),
        *_above_idle(rows, _of(sums, _TRAIN), work, stated, caveats),
        *_goodput(sums),
        *_lost(rows, _of(sums, _TRAIN)),
        *_data(sums, work),
        *_facility(rows, stated, caveats, carbon=carbon, price=price),
        *_gpus(rows, work, stated),
    )
    return Figures(by_bucket=sums, by_key={figure.key: figure for figure in found})


def _of(sums: _Sums, *stages: str) -> Total:
    return combined(total for (stage, _), total in sums.items() if stage in stages)


def _caveats(rows: Rows, work: Work) -> tuple[str, ...]:
    metered: defaultdict[int, set[int]] = defaultdict(set)
    for row in rows:
        if row["stage"] == _TRAIN and row["joules"] > 0:
            metered[row["attempt"]].add(row["rank"])
    num_metered = max(map(len, metered.values()), default=work.num_nodes)
    if num_metered >= work.num_nodes:
        return ()
    return (f"the meters of {num_metered} of {work.num_nodes} nodes alone",)


def _energy(sums: _Sums, caveats: Sequence[str]) -> Iterator[Figure]:
    whole = combined(sums.values())
    if whole.joules > 0:
        stages = ", ".join(dict.fromkeys(stage for stage, _ in sums))
        models = [words for name, words in _MODELS.items() if name in whole.known_by]
        assumed = (f"of {stages}", *models, *caveats)
        yield Figure("energy", "Energy", whole.joules, "J", whole.known_by, assumed)


def _per_image(sums: _Sums, work: Work, caveats: Sequence[str]) -> Iterator[Figure]:
    train, productive = _of(sums, _TRAIN), sums.get((_TRAIN, Bucket.PRODUCTIVE), Total())
    if work.images <= 0 or train.joules <= 0:
        return
    yield Figure(
        "gross_energy_per_image",
        "Energy per image, gross",
        train.joules / work.images,
        "J/image",
        train.known_by,
        (f"all of training / {work.images:,} images: starts, stalls and lost work too", *caveats),
    )
    if productive.joules > 0:
        yield Figure(
            "net_energy_per_image",
            "Energy per image, net",
            productive.joules / work.images,
            "J/image",
            productive.known_by,
            ("only steps that are in the result", *caveats),
        )
    yield Figure(
        "images_per_kwh",
        "Images per kWh",
        work.images / (train.joules / J_PER_KWH),
        "images/kWh",
        train.known_by,
        ("gross", *caveats),
    )


def _above_idle(
    rows: Rows, train: Total, work: Work, stated: AccountsConfig, caveats: Sequence[str]
) -> Iterator[Figure]:
    """Tell what the nodes of training would have drawn anyway from what the work drew."""
    own = [row for row in rows if row["stage"] == _TRAIN]
    idle = idle_of(own, stated_w=stated.idle_node_w)
    if idle is None or min(train.joules, idle.joules) <= 0:
        return
    how = "measured before its ranks met" if stated.idle_node_w is None else "stated"
    watts = f"{idle.joules / idle.metered_s:.3g} W per node, {how}"
    known = _shares(idle.joules_by)
    words = (f"{watts}, x all metered time of training", *caveats)
    yield Figure("idle_energy", "Energy of idle nodes", idle.joules, "J", known, words)
    if work.images > 0:
        yield Figure(
            "energy_above_idle_per_image",
            "Energy per image above idle",
            (train.joules - idle.joules) / work.images,
            "J/image",
            _shares(train.joules_by, idle.joules_by),
            (f"gross, less what idle nodes draw: {watts}", *caveats),
        )


def _shares(*parts: Mapping[Any, float]) -> dict[str, float]:
    """Return by which shares joules, and others that are taken from them, are known."""
    whole_j = sum(sum(part.values()) for part in parts)
    shares: defaultdict[str, float] = defaultdict(float)
    for part in parts:
        for how, joules in part.items():
            if joules > 0:
                shares[how] += joules / whole_j
    return dict(shares)


def _goodput(sums: _Sums) -> Iterator[Figure]:
    train, productive = _of(sums, _TRAIN), sums.get((_TRAIN, Bucket.PRODUCTIVE), Total())
    if train.joules > 0:
        frac = productive.joules / train.joules
        known = train.known_by
        yield Figure("energy_goodput", "Energy goodput", frac, "frac", known, ("net / gross",))
    if train.seconds > 0:
        frac = productive.seconds / train.seconds
        assumed = ("productive / all seconds of training",)
        yield Figure("time_goodput", "Time goodput", frac, "frac", _CLOCK, assumed)


def _lost(rows: Rows, train: Total) -> Iterator[Figure]:
    if train.joules <= 0:
        return
    by_attempt: defaultdict[int, Total] = defaultdict(Total)
    for (stage, attempt, _), own in lost_work(rows).items():
        if stage == _TRAIN:
            by_attempt[attempt] = combined((by_attempt[attempt], own))
    lost = combined(by_attempt.values())
    yield Figure(
        "lost_energy",
        "Energy of lost work",
        lost.joules / J_PER_KWH,
        "kWh",
        lost.known_by or train.known_by,
        (
            "steps done again after a stop or a rollback",
            "what a killed attempt drew after its last row is in no account",
        ),
    )
    if interrupted := [by_attempt[attempt] for attempt in sorted(by_attempt)[:-1]]:
        lost = combined(interrupted)
        yield Figure(
            "lost_energy_per_interruption",
            "Energy of lost work per interruption",
            lost.joules / len(interrupted) / J_PER_KWH,
            "kWh",
            lost.known_by or train.known_by,
            (f"mean over the attempts that another one followed, {len(interrupted)}",),
        )


def _data(sums: _Sums, work: Work) -> Iterator[Figure]:
    data = _of(sums, *_DATA)
    if data.joules <= 0:
        return
    stages = ", ".join(dict.fromkeys(stage for stage, _ in sums if stage in _DATA))
    for thing, count, what in (
        ("image", work.images, "images trained on, all put down to this run"),
        ("sample", work.kept_samples, "samples of the dataset"),
    ):
        if count > 0:
            yield Figure(
                f"data_energy_per_{thing}",
                f"Energy of the data per {thing}",
                data.joules / count,
                f"J/{thing}",
                data.known_by,
                (f"{stages} / {count:,} {what}",),
            )


def _facility(
    rows: Rows,
    stated: AccountsConfig,
    caveats: Sequence[str],
    *,
    carbon: Rate | None,
    price: Rate | None,
) -> Iterator[Figure]:
    """Add what no meter covers, and follow it to CO2 and money, row by row in its time."""
    ends_unix_s = period_ends(rows)
    joules_by: defaultdict[str, float] = defaultdict(float)
    g_co2 = cost = 0.0
    for row in rows:
        is_on = row["bucket"] != Bucket.QUEUE
        overhead_j = row["seconds"] * stated.node_overhead_w if is_on else 0.0
        joules_by[row["provenance"]] += row["joules"] * stated.pue
        joules_by["stated"] += overhead_j * stated.pue
        kwh = (row["joules"] + overhead_j) * stated.pue / J_PER_KWH
        if kwh > 0:
            span = (row["start_unix_s"], ends_unix_s[writer_of(row), row["start_unix_s"]])
            g_co2 += kwh * carbon.mean(*span) if carbon else 0.0
            cost += kwh * price.mean(*span) if price else 0.0
    whole_j = sum(joules_by.values())
    if whole_j <= joules_by["stated"]:  # nothing was metered
        return
    known = {name: joules / whole_j for name, joules in joules_by.items() if joules > 0}
    watts = stated.node_overhead_w
    overhead = (f"{watts:g} W per node beside its meters, stated",) if watts else ()
    pue = "stated" if stated.pue > 1 else "nothing for cooling and power supplies"
    assumed = (f"PUE {stated.pue:g}: {pue}", *overhead, *caveats)
    yield Figure("facility_energy", "Facility energy", whole_j / J_PER_KWH, "kWh", known, assumed)
    if carbon:
        words = (carbon.words, "of the facility energy", *caveats)
        yield Figure("carbon", "Carbon", g_co2 / 1e3, "kgCO2e", known, words)
    if price:
        words = (price.words, "of the facility energy", *caveats)
        yield Figure("energy_cost", "Cost of energy", cost, stated.currency, known, words)


def _gpus(rows: Rows, work: Work, stated: AccountsConfig) -> Iterator[Figure]:
    node_s = sum(
        row["seconds"] for row in rows if row["stage"] == _TRAIN and row["bucket"] != Bucket.QUEUE
    )
    gpus_per_node = work.num_gpus // work.num_nodes
    gpu_hours = node_s / _S_PER_HOUR * gpus_per_node
    if gpu_hours <= 0:
        return
    assumed = (f"all nodes of all attempts of training x {gpus_per_node} GPUs",)
    yield Figure("gpu_hours", "GPU hours", gpu_hours, "GPU h", _CLOCK, assumed)
    if stated.price_per_gpu_hour is not None:
        words = (f"{stated.price_per_gpu_hour:g} {stated.currency} per GPU hour, stated",)
        cost = gpu_hours * stated.price_per_gpu_hour
        yield Figure("gpu_cost", "Cost of GPUs", cost, stated.currency, _CLOCK, words)
