"""Draw each prompt's picture several times and write how much it varies, pixel by pixel."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from torch import Tensor

from trainer.config_tools import UncertaintyConfig
from trainer.diffusion.uncertainty import mean_and_variance
from trainer.errors import BadInput
from trainer.gallery import sample_name
from trainer.labels import Label, is_complete, png_bytes, publish_labelled
from trainer.observe.countdown import Countdown
from trainer.pictures import Wanted, Work, batches_of
from trainer.runtime.checkpoint import read_record, verify
from trainer.runtime.rundir import checkpoint_root, complete
from trainer.runtime.weights import kind_of, weights_fingerprint
from trainer.sampler import Pixels, Sampler


@dataclass(frozen=True)
class Member:
    """One way to draw a prompt's picture."""

    name: str
    sampler: Callable[[], Sampler]
    """Loads its weights; nobody keeps them."""
    repeat: int
    """Which of the prompt's noises."""


def members(sampler: Sampler, run: Path, cfg: UncertaintyConfig) -> list[Member]:
    """List the ensemble; the first draws the picture itself, before any watermark.

    Args:
        sampler: Of the pictures.
        run: Its run directory.
        cfg: Over what, and how many.

    Raises:
        BadInput: Over the weights of an exported folder, which has but one set.
    """
    if cfg.over == "seeds":
        return [Member(f"noise {n}", lambda: sampler, n) for n in range(cfg.count)]
    if sampler.trained is None:
        raise BadInput(
            f"uncertainty.over=weights, but {run} is an exported folder, which has but one set of "
            "weights. Give the run, or over: seeds."
        )
    every = [
        _of_weights(sampler, run, folder, which)
        for folder in reversed(complete(checkpoint_root(run)))
        for which in (*read_record(folder).averages, "raw")
        if verify(folder, {kind_of(which)}) is None
    ]
    return every[: cfg.count]


def draw_variances(work: Work, prompts: Sequence[str], ensemble: Sequence[Member]) -> None:
    """Write sample_NNNN_variance.png, .npy and .json for this part's prompts.

    The .npy holds ``(H, W, 3)`` float32: the unbiased variance over the ensemble of the pictures'
    colours, as they are stored, in [0, 1].
    """
    first = [Wanted(prompt, number, 0) for number, prompt in enumerate(prompts)]
    common = {**work.label, "uncertainty": [member.name for member in ensemble]}
    todo = [
        batch
        for batch in batches_of(first, work)
        if not all(is_complete(work.folder, variance_name(p), p.label(common)) for p in batch)
    ]
    total = sum(map(len, todo)) * work.sampling.num_steps * len(ensemble)
    with Countdown("uncertainty", total, unit="steps") as countdown:
        for start in range(0, len(todo), work.sampler.threads):
            group = todo[start : start + work.sampler.threads]
            drawn = _draw(work, group, ensemble, countdown.advance)
            _, variance_BHWC = mean_and_variance(drawn)
            pictures = [picture for batch in group for picture in batch]
            for picture, variance_HWC in zip(pictures, variance_BHWC.numpy(), strict=True):
                _publish(work.folder, variance_name(picture), picture.label(common), variance_HWC)


def variance_name(picture: Wanted) -> str:
    """Name the files of a prompt's variance, without suffix."""
    return f"{sample_name(picture.number)}_variance"


def heat_map(variance_HWC: NDArray[np.float64]) -> tuple[Pixels, float]:
    """Colour standard deviations, black to yellow; also return what is brightest.

    Args:
        variance_HWC: Of colours in [0, 1].
    """
    std_HW = np.sqrt(variance_HWC.mean(2))
    brightest = float(std_HW.max())
    colours = colormaps["inferno"](std_HW / max(brightest, 1e-12))[..., :3]
    return (colours * 255).round().astype(np.uint8), brightest


def _of_weights(sampler: Sampler, run: Path, folder: Path, which: str) -> Member:
    name = f"{folder.name}/{which} {weights_fingerprint(run, which, folder)}"
    return Member(name, lambda: sampler.with_weights(run, folder, which), 0)


def _draw(
    work: Work,
    group: Sequence[Sequence[Wanted]],
    ensemble: Sequence[Member],
    on_steps: Callable[[int], None],
) -> Iterator[Tensor]:
    """Yield each member's pictures of some batches, ``(B, H, W, 3)`` in [0, 1]."""
    for member in ensemble:
        asked = [[replace(p, repeat=member.repeat).asked for p in batch] for batch in group]
        drawn = member.sampler().draw(asked, work.sampling, known=work.known, on_steps=on_steps)
        yield torch.from_numpy(np.concatenate(list(drawn))).double() / 255


def _publish(folder: Path, name: str, label: Label, variance_HWC: NDArray[np.float64]) -> None:
    pixels, brightest = heat_map(variance_HWC)
    scale: dict[str, Any] = {
        "shows": "standard deviation of colours in [0, 1], root of the mean variance of the three",
        "darkest": 0.0,
        "brightest": brightest,
    }
    numbers = BytesIO()
    np.save(numbers, variance_HWC.astype(np.float32))
    label = {**label, "heat_map": scale}
    files = {f"{name}.npy": numbers.getvalue(), f"{name}.png": png_bytes(pixels, label)}
    publish_labelled(folder, name, label, files)
