"""Weights of a run, put together from its checkpoints: averages, raw, or averages made afterwards.

Which: `ema`, the first average of the run; `raw`, as the optimizer left them; the name of another
average, such as `half_life_2000` or `power_0.1`. A power average that the run did not keep is made
from those that it kept, over all of its checkpoints (Karras et al. 2024, section 3.2).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.errors import BadInput
from trainer.runtime.checkpoint import (
    Kind,
    Record,
    TrainState,
    load,
    newest_valid,
    read_record,
    verify,
)
from trainer.runtime.ema import POWER, gamma_of
from trainer.runtime.rundir import checkpoint_root, complete, step_of


@dataclass(frozen=True)
class Kept:
    """A power average in a checkpoint."""

    folder: Path
    average: str
    images_seen: float
    gamma: float


def kind_of(which: str) -> Kind:
    """Which files the weights lie in."""
    return "weight" if which == "raw" else "ema"


def read_weights(
    run: Path, which: str, *, checkpoint: Path | None = None
) -> tuple[dict[str, Tensor], TrainState]:
    """Put weights together from a run's newest valid checkpoint; reads nothing else of it.

    Args:
        run: Run directory.
        which: See the module.
        checkpoint: Another checkpoint than the newest.

    Returns:
        Every parameter by name, fp32 on CPU in its full shape, and where training stood.

    Raises:
        BadInput: The run has no valid checkpoint, or no such average can be made from what it has.
    """
    folder = checkpoint or newest_valid(checkpoint_root(run), {kind_of(which)})
    if folder is None:
        raise BadInput(
            f"{run} has no complete checkpoint; train it first: kiln train run={run} ..."
        )
    record = read_record(folder)
    if which in {"raw", "ema", *record.averages}:
        average = record.averages[0] if which == "ema" else which
        return _read(folder, record, None if which == "raw" else average), record.state
    total: dict[str, Tensor] = {}
    for kept, share in _recipe(run, folder, record, which):
        for name, tensor in _read(kept.folder, read_record(kept.folder), kept.average).items():
            # In fp64: the shares are large and of both signs.
            total[name] = total.get(name, torch.zeros(())) + share * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}, record.state


def weights_fingerprint(run: Path, which: str, folder: Path) -> str:
    """Hash the hashes of the files that weights are read from: one name for them."""
    record = read_record(folder)
    folders = [folder]
    if which not in {"raw", "ema", *record.averages}:
        folders = [kept.folder for kept, _ in _recipe(run, folder, record, which)]
    lines = [
        f"{step_of(each)} {file.rank} {file.sha256}\n"
        for each in folders
        for file in read_record(each).of({kind_of(which)})
    ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def shares(kept: Sequence[Kept], *, images_seen: float, gamma: float) -> NDArray[np.float64]:
    """Weigh averages so that their sum comes nearest to another one, in the least-squares sense.

    Karras et al. 2024, section 3.2 and appendix C.3: a power average is a profile over training,
    and the inner products of such profiles have a closed form.

    Args:
        kept: The averages there are, at different times or of different widths.
        images_seen: Where the wanted average ends.
        gamma: Its exponent.

    Returns:
        ``(len(kept),)``, scaled to a sum of 1, so that weights that never moved stay as they are.
    """
    times = np.array([each.images_seen for each in kept])
    gammas = np.array([each.gamma for each in kept])
    inner = _inner(times[:, None], gammas[:, None], times[None], gammas[None])
    wanted = _inner(times, gammas, np.array(float(images_seen)), np.array(gamma))
    # Scaled to unit norm: profiles of early checkpoints are much taller than those of late ones.
    norms = np.sqrt(np.diag(inner))
    solved = np.linalg.lstsq(inner / norms[:, None] / norms, wanted / norms, rcond=1e-14)[0]
    found: NDArray[np.float64] = solved / norms
    found /= found.sum()
    return found


def _inner(
    time: NDArray[np.float64],
    gamma: NDArray[np.float64],
    other_time: NDArray[np.float64],
    other_gamma: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Integrate the product of two profiles, (gamma + 1) t^gamma / T^(gamma + 1) up to T."""
    exponent = np.where(time < other_time, other_gamma, -gamma)
    product: NDArray[np.float64] = (
        (gamma + 1)
        * (other_gamma + 1)
        * (time / other_time) ** exponent
        / ((gamma + other_gamma + 1) * np.maximum(time, other_time))
    )
    return product


def _recipe(run: Path, folder: Path, record: Record, which: str) -> Iterator[tuple[Kept, float]]:
    if not which.startswith(POWER):
        raise BadInput(
            f"{folder} has no average {which!r}, but {', '.join(record.averages)}. Give one of "
            f"them, ema or raw; of power averages any width, as in {POWER}0.1."
        )
    kept = list(_kept(run, until=step_of(folder)))
    if len(kept) < 2:
        raise BadInput(
            f"weights={which} is made of at least two power averages, and the checkpoints of "
            f"{run} have {len(kept)}. Train with ema.power_sigma_rel=[0.05,0.1] and "
            "checkpoint.keep_ema_every_images=..., or give one of "
            f"{', '.join(['ema', 'raw', *record.averages])}."
        )
    gamma = gamma_of(float(which.removeprefix(POWER)))
    found = shares(kept, images_seen=record.state.images_seen, gamma=gamma)
    yield from zip(kept, found.tolist(), strict=True)


def _kept(run: Path, *, until: int) -> Iterator[Kept]:
    for folder in complete(checkpoint_root(run)):
        if step_of(folder) <= until and verify(folder, {"ema"}) is None:
            record = read_record(folder)
            for name in record.averages:
                if name.startswith(POWER):
                    gamma = gamma_of(float(name.removeprefix(POWER)))
                    yield Kept(folder, name, record.state.images_seen, gamma)


def _read(folder: Path, record: Record, average: str | None) -> dict[str, Tensor]:
    weights = {name: torch.empty(shape) for name, shape in record.shapes.items()}
    kind: Kind = "weight" if average is None else "ema"
    prefix = "" if average is None else f"{average}/"
    whole = {f"{prefix}{name}@0": weight.view(-1) for name, weight in weights.items()}
    load(folder, {kind: whole}, record.shapes)
    return weights
