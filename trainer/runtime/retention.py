"""Which checkpoints stay, and which of them whole."""

from collections.abc import Mapping, Sequence
from typing import Literal

from trainer.config_engine import CheckpointConfig

Fate = Literal["whole", "thin", "gone"]


def fates(
    images: Sequence[int], cfg: CheckpointConfig, *, best: int | None = None
) -> Mapping[int, Fate]:
    """Decide over checkpoints.

    Args:
        images: Images seen at each of them, rising.
        cfg: The policy.
        best: Images seen at the best one so far, by `checkpoint.keep_best`.

    Returns:
        Images seen -> whole, thin (its averages alone), or gone.
    """
    last = set(images[-cfg.keep_last :])
    whole = last | {best} | _first_in_each(images, cfg.keep_every_images)
    thin = _first_in_each(images, cfg.keep_ema_every_images)
    return {n: "whole" if n in whole else "thin" if n in thin else "gone" for n in images}


def _first_in_each(images: Sequence[int], every: int | None) -> set[int]:
    """Pick the first checkpoint at or behind each multiple of `every`."""
    if every is None:
        return set()
    first: dict[int, int] = {}
    for n in images:
        first.setdefault(n // every, n)
    return {n for bucket, n in first.items() if bucket > 0}
