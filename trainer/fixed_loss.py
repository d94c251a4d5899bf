"""The loss at fixed times, noise and pairs: one number that any batch size and machine agrees on.

As MLPerf's text-to-image benchmark measures its validation loss: nothing is drawn anew, so that
two checkpoints differ by their weights alone.

Letters: ``N`` pairs, ``K`` times, ``B`` pairs of a batch, ``C H W`` of latents.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.build import build_loss, training_times
from trainer.config_diffusion import DenoisingConfig
from trainer.diffusion import philox
from trainer.diffusion.parameterization import Parameterization
from trainer.diffusion.process import Process, diffuse, like, log_snr, time_at
from trainer.models.parallel import one_core_workers
from trainer.quality.bootstrap import interval
from trainer.quality.resampled import mean_statistic
from trainer.sampler import Sampler, pad_texts

Floats = NDArray[np.float64]

LEVELS = (-7.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0, 7.0)
"""Log-SNRs at which runs of any process and objective are compared, as far as it reaches."""
_SEED = 0


@dataclass(frozen=True)
class Pairs:
    """Latents with captions that a network is asked to denoise."""

    x0_NCHW: Tensor
    """Normalised, float32, with the noise of the autoencoder's posterior in them."""
    texts: list[Tensor]
    """N text states."""
    source: str
    """Where they are from, for people: whether training saw them."""


@dataclass(frozen=True)
class Errors:
    """What a network did at K times on N pairs."""

    times_K: Tensor
    loss_NK: Floats
    """The run's own objective, weighted."""
    x0_NK: Floats
    """Mean squared error of the clean latent, in units of the data's variance."""
    eps_NK: Floats
    """Mean squared error of the noise."""


def normalised(sampler: Sampler, moments_N2CHW: Tensor) -> Tensor:
    """Draw latents from their posteriors, keyed by their number, and normalise them."""
    mean, logvar = moments_N2CHW[:, 0], moments_N2CHW[:, 1]
    ids_N = torch.arange(len(mean))
    noise = philox.normals(
        _SEED, ids_N, torch.zeros_like(ids_N), purpose=philox.LATENT, shape=mean.shape[1:]
    )
    latents = mean + (0.5 * logvar).exp() * noise
    shift, scale = (each.cpu()[:, None, None] for each in
                    (sampler.latent_mean_C, sampler.latent_std_C))  # fmt: skip
    return (latents - shift) / scale


def law_times(cfg: DenoisingConfig, process: Process, count: int) -> Tensor:
    """Return ``(K,)`` times in the middle of K equally likely parts of the training law."""
    u_K = (torch.arange(count) + 0.5) / count
    return training_times(cfg.times, process)(u_K)


def level_times(process: Process) -> Tensor:
    """Return the times of `LEVELS`, or the nearest that the process is trained at."""
    times_K = time_at(process, torch.tensor(LEVELS, dtype=torch.float64))
    if process.num_levels is not None:
        times_K = (times_K * process.num_levels).round().clamp(min=1) / process.num_levels
    return times_K.clamp(min=process.min_time).float()


def errors(
    sampler: Sampler,
    pairs: Pairs,
    times_K: Tensor,
    *,
    batch_images: int,
    on_passes: Callable[[int], None] = lambda _: None,
) -> Errors:
    """Measure a network; noise is keyed by (a fixed seed, the pair's number, the time's number).

    Args:
        sampler: The network, and where it runs.
        pairs: N of them.
        times_K: Times.
        batch_images: Pairs per pass through the network; changes no number but by rounding.
        on_passes: Told, from several threads, how many more pairs passed the network.
    """
    count = len(pairs.texts)
    found = np.empty((3, count, len(times_K)))
    work = [(k, first) for k in range(len(times_K)) for first in range(0, count, batch_images)]
    measure = _Measure(sampler, pairs)

    def run(job: tuple[int, int]) -> None:
        number, first = job
        rows = slice(first, min(first + batch_images, count))
        found[:, rows, number] = measure(rows, number, times_K[number])
        on_passes(rows.stop - rows.start)

    with one_core_workers(sampler.threads) as workers:
        list(workers.map(run, work))
    return Errors(times_K, *found)


class _Measure:
    """The errors of a batch of pairs at one time."""

    def __init__(self, sampler: Sampler, pairs: Pairs) -> None:
        self._sampler, self._pairs, self._loss = sampler, pairs, build_loss(sampler.objective)

    @torch.inference_mode()
    def __call__(self, rows: slice, number: int, time: Tensor) -> Floats:
        device, parameterization = self._sampler.device, self._sampler.parameterization
        x0 = self._pairs.x0_NCHW[rows].to(device)
        ids_B = torch.arange(rows.start, rows.stop, device=device)
        noise = philox.normals(
            _SEED, ids_B, torch.full_like(ids_B, number), purpose=philox.NOISE, shape=x0.shape[1:]
        )
        t_B = time.to(device).expand(len(x0))
        text_BLD, mask_BL = (each.to(device) for each in pad_texts(self._pairs.texts[rows]))
        kept: list[Tensor] = []

        def predict(x_t: Tensor, time_B: Tensor) -> Tensor:
            kept.append(self._sampler.model(x_t, time_B, text_BLD, mask_BL).float())
            return kept[-1]

        loss_B = self._loss(predict, x0, noise, t_B)
        x0_B, eps_B = _common(parameterization, kept[0], x0, noise, t_B)
        measured: Floats = torch.stack([loss_B.float(), x0_B, eps_B]).double().cpu().numpy()
        return measured


def _common(
    parameterization: Parameterization, prediction: Tensor, x0: Tensor, noise: Tensor, t_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``(B,)`` mean squared errors of x0 and of eps."""
    t = like(t_B, x0)
    x_t = diffuse(parameterization.process, x0, noise, t)
    said = parameterization.data(prediction, x_t, t), parameterization.noise(prediction, x_t, t)
    x0_error, eps_error = ((a - b).square().flatten(1).mean(1)
                           for a, b in zip(said, (x0, noise), strict=True))  # fmt: skip
    return x0_error, eps_error


def curve(process: Process, measured: Errors) -> list[dict[str, float | None]]:
    """Return one row per time: its log-SNR, and the means of the loss and of the errors."""
    rows: list[dict[str, float | None]] = []
    levels_K = log_snr(process, measured.times_K.double())
    v_NK = v_errors(process, measured)
    for number, (time, level) in enumerate(
        zip(measured.times_K.tolist(), levels_K.tolist(), strict=True)
    ):
        told = {"loss": measured.loss_NK, "x0_error": measured.x0_NK, "eps_error": measured.eps_NK}
        row = {"time": time, "log_snr": level}
        for name, values_NK in {**told, "v_error": v_NK}.items():
            found = with_interval(values_NK[:, number])
            row[name] = found["value"]
            row |= {f"{name}_{end}": found[end] for end in ("low", "high") if end in found}
        rows.append({key: value if math.isfinite(value) else None for key, value in row.items()})
    return rows


def v_errors(process: Process, measured: Errors) -> Floats:
    """Return ``(N, K)`` squared errors of v as if every process preserved the variance.

    They are the errors of x0 times 1 + SNR, and those of eps times 1 + 1 / SNR, so that no level
    dominates a mean: 1 at each is what knowing nothing of the data but its variance costs.
    """
    snr_K = torch.exp(log_snr(process, measured.times_K.double())).numpy()
    found: Floats = measured.x0_NK * (1 + snr_K)
    return found


def score(values_NK: Floats) -> dict[str, Any]:
    """Return the mean over all times and pairs, with its interval over pairs."""
    return with_interval(values_NK.mean(1))


def with_interval(values_N: Floats) -> dict[str, Any]:
    """Return a mean with its 95 % interval by half-samples, which needs four values."""
    told: dict[str, Any] = {"value": float(values_N.mean()), "count": len(values_N)}
    if len(values_N) >= 4 and np.isfinite(values_N).all():
        found = interval(mean_statistic(values_N), len(values_N), seed=_SEED)
        told |= {"low": found.low, "high": found.high}
    return told


def loss_scores(
    sampler: Sampler,
    pairs: Pairs,
    num_times: int,
    *,
    batch_images: int,
    on_passes: Callable[[int], None] = lambda _: None,
) -> Mapping[str, Any]:
    """Return scores and curves of the fixed loss; `len(pairs) * (num_times + len(LEVELS))` passes.

    `loss` is the run's own objective, over times spread as training draws them. `v_error` is over
    `LEVELS`: a number in which any two runs on the same latents can be compared.
    """
    process, objective = sampler.parameterization.process, sampler.objective
    own, common = (
        errors(sampler, pairs, times_K, batch_images=batch_images, on_passes=on_passes)
        for times_K in (law_times(objective, process, num_times), level_times(process))
    )
    return {
        "scores": {"loss": score(own.loss_NK), "v_error": score(v_errors(process, common))},
        "pairs": pairs.source,
        "loss_by_time": curve(process, own),
        "errors_by_log_snr": curve(process, common),
    }
