"""Everything that is measured of one checkpoint: alignment, distances to real pictures, loss."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_prep.scenes import caption, held_out_scenes
from trainer.config_tools import EvaluateConfig, SamplingConfig
from trainer.data.manifest import load_manifest
from trainer.encoded import matching_encoding
from trainer.fidelity import ENOUGH, FEWEST, Fidelity, clip_score, open_clip, open_fidelity
from trainer.fixed_loss import LEVELS, Pairs, loss_scores, normalised
from trainer.gallery import Shown
from trainer.judging import (
    has_scenes,
    judge_scenes,
    painted,
    pictures_material,
    psnr,
    row,
    scenes_material,
    with_chance,
)
from trainer.models.parallel import one_core_workers
from trainer.place import place
from trainer.quality.features import Rows
from trainer.quality.shares import Share
from trainer.real_pictures import captioned_pictures, encoded_pairs
from trainer.sampler import RECONSTRUCTION_BATCH, Pixels, Sampler

log = logging.getLogger(__name__)

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Verdict:
    """What was found of a checkpoint."""

    facts: dict[str, Any]
    """`scores`, and what they were measured on."""
    shown: list[Shown]
    """Pictures of the captions."""


def passes_per_step(cfg: SamplingConfig) -> int:
    """Return how often a step puts a picture through the denoiser; of dopri5 about."""
    asks = {"heun": 2, "predictor_corrector": 2, "dopri5": 6}.get(cfg.solver, 1)
    return asks * (1 if cfg.guidance_scale == 1 else 2)


class Judge:
    """Measures any checkpoint of one run; what they share is made once."""

    def __init__(self, cfg: EvaluateConfig, sampler: Sampler, advance: Advance) -> None:
        """Choose and load what everything is compared with; needs any weights of the run.

        Raises:
            BadInput: Validation data of other encoders, no such network of features, ...
        """
        self.cfg, self._advance = cfg, advance
        self._on_steps: Advance = lambda steps: advance(steps * passes_per_step(cfg.sampling))
        dataset = place(cfg.validation or sampler.cfg.data.dataset)
        scenes = has_scenes(dataset)
        self._scenes = scenes and cfg.validation is None
        self.pairs = self._choose_pairs(sampler)
        if self._scenes:
            self.material = scenes_material(cfg, sampler)
        else:
            self.material = pictures_material(cfg, sampler, dataset, scenes=scenes)
            if not scenes:
                log.warning(
                    "%s holds no painted scenes, so no exact score exists%s",
                    dataset,
                    "" if cfg.validation else ": the captions are of training pictures",
                )
        self.more = self._more_captions(sampler)
        self.fidelity = open_fidelity(cfg, sampler, advance)
        self.clip = open_clip(cfg, self.fidelity.features if self.fidelity else None)
        self._seen: dict[tuple[str, str], Rows] = {}
        self._warned = False

    @staticmethod
    def passes(cfg: EvaluateConfig, num_checkpoints: int) -> int:
        """Return about how many times `advance` will be told of a picture's pass."""
        pictures = cfg.num_captions + cfg.num_unseen_pairs
        pictures += max(0, (cfg.num_pictures or 0) - cfg.num_captions)
        each = pictures * cfg.sampling.num_steps * passes_per_step(cfg.sampling)
        each += cfg.num_loss_pairs * (cfg.num_loss_times + len(LEVELS))
        chance = cfg.num_captions * cfg.sampling.num_steps * passes_per_step(cfg.sampling)
        reference = cfg.num_reference if cfg.features else 0
        return num_checkpoints * each + reference + (chance if num_checkpoints else 0)

    def judge(self, sampler: Sampler) -> Verdict:
        """Draw with a checkpoint's weights, and measure."""
        if self._scenes and "chance" not in self.material.columns:
            self.material = with_chance(self.material, self.cfg, sampler, self._on_steps)
        material, count = self.material, len(self.material.captions)
        asked = [*material.captions, *material.unseen, *self.more]
        drawn = sampler.sample(asked, self.cfg.sampling, on_steps=self._on_steps)
        own, more = drawn[:count], drawn[count + len(material.unseen) :]
        facts: dict[str, Any] = {"scores": {}}
        verdicts: list[bool | None] = [None] * count
        if material.has_scenes:
            facts["scores"], found = judge_scenes(material, drawn[: len(asked) - len(self.more)])
            verdicts = [fact.shape_and_colour for fact in found]
        facts["scorer"] = self._scorer()
        facts["scores"] |= self._near_to_real(own, more)
        if not material.has_scenes:
            ratios = psnr(material.columns["real"], material.columns["reconstructed"])
            told = {"value": float(ratios.mean()), "count": len(ratios)}
            facts["scores"]["autoencoder_psnr_db"] = told
        if self.fidelity:
            net = self.fidelity.features
            facts["features"] = f"{net.name} {net.fingerprint}, real: {self.fidelity.source}"
        if self.pairs is not None:
            losses = loss_scores(
                sampler,
                self.pairs,
                self.cfg.num_loss_times,
                batch_images=self.cfg.sampling.batch_images,
                on_passes=self._advance,
            )
            facts["scores"] |= losses["scores"]
            facts |= {name: value for name, value in losses.items() if name != "scores"}
        shown = zip(material.captions, own, verdicts, strict=True)
        return Verdict(facts, [Shown(*each) for each in shown])

    def _scorer(self) -> str:
        if self.material.has_scenes:
            return "scenes read back"
        whose = self.cfg.validation or "the training data"
        return f"none for these pictures; captions of {whose}"

    def _near_to_real(self, own: Pixels, more: Pixels) -> dict[str, Any]:
        """Compare drawn pictures with real ones and with captions, beside the other columns."""
        wanted = self.cfg.num_pictures or len(own)
        drawn = np.concatenate([own, more])[:wanted]
        columns = {name: pictures[:wanted] for name, pictures in self.material.columns.items()}
        scores: dict[str, Any] = {}
        if self.fidelity and len(drawn) < FEWEST:
            log.warning(
                "no distances to real pictures: %d were drawn, and %d are needed. Give "
                "num_captions= or num_pictures= at least %d.",
                len(drawn),
                FEWEST,
                FEWEST,
            )
        elif self.fidelity:
            scores |= self._distances(self.fidelity, drawn, columns)
        if self.clip:
            captions = [*self.material.captions, *self.more][:wanted]
            told = {"": self._clip(self.clip(drawn), captions)}
            for name, pictures in columns.items():
                rows = self._once(f"clip {self.clip.fingerprint}", name, pictures, self.clip)
                told[name] = self._clip(rows, captions[: len(pictures)])
            scores["clip_score"] = row("x", {name: {"x": share} for name, share in told.items()})
        return scores

    def _distances(
        self, fidelity: Fidelity, drawn: Pixels, columns: Mapping[str, Pixels]
    ) -> dict[str, Any]:
        rows = fidelity.features(drawn)
        found = {"": fidelity.scores(rows)}
        for name, pictures in columns.items():
            if len(pictures) == len(drawn):  # distances of unequal numbers say nothing
                theirs = self._once("features", name, pictures, fidelity.features)
                found[name] = fidelity.scores(theirs)
        if len(drawn) < ENOUGH and not self._warned:
            self._warned = True
            log.warning(
                "distances of %d pictures are too large, the Frechet distance by about %.3g: "
                "compare them with those of as many pictures only, or give num_pictures=%d",
                len(drawn),
                fidelity.bias(rows),
                ENOUGH,
            )
        return {name: row(name, found) for name in found[""]}

    def _clip(self, rows: Rows, captions: list[str]) -> Share:
        assert self.clip is not None
        return clip_score(self.clip, rows, captions, draws=self.cfg.bootstrap_draws)

    def _once(
        self, what: str, column: str, pictures: Pixels, features: Callable[[Pixels], Rows]
    ) -> Rows:
        if (what, column) not in self._seen:
            self._seen[what, column] = features(pictures)
        return self._seen[what, column]

    def _more_captions(self, sampler: Sampler) -> list[str]:
        """Take captions of the reference, where more pictures are asked for than captions."""
        count = (self.cfg.num_pictures or 0) - len(self.material.captions)
        if count <= 0:
            return []
        dataset = place(self.cfg.reference or self.cfg.validation or sampler.cfg.data.dataset)
        found = [text for text, _ in captioned_pictures(dataset, count, side_px=8)]
        # The same caption again is another picture: noise is keyed by the number.
        return [found[number % len(found)] for number in range(count)]

    def _choose_pairs(self, sampler: Sampler) -> Pairs | None:
        count = self.cfg.num_loss_pairs
        if count == 0:
            return None
        if self._scenes:
            return _scene_pairs(self.cfg, sampler)
        dataset = place(self.cfg.validation or sampler.cfg.data.dataset)
        source = self.cfg.validation or f"{dataset}, on which the run was trained"
        if sampler.cfg.data.latents == "online":
            side_px = sampler.cfg.encoders.image_side_px
            captions, pictures = zip(
                *captioned_pictures(dataset, count, side_px=side_px, as_encoded=True), strict=True
            )
            source = f"{len(captions)} of {source}"
            return _encoded_now(sampler, captions, np.stack(pictures), source)
        encoding = matching_encoding(sampler.cfg, dataset, load_manifest(dataset))
        moments, texts = encoded_pairs(dataset, encoding, count, shape=sampler.latent_shape)
        return Pairs(normalised(sampler, moments), texts, f"{len(texts)} of {source}")


def _scene_pairs(cfg: EvaluateConfig, sampler: Sampler) -> Pairs:
    """Paint scenes that training never sees, and encode them as the training data was."""
    # Not sampling.seed: the pairs are the same however pictures are drawn.
    scenes = held_out_scenes(cfg.num_loss_pairs, seed=0, two_things_frac=cfg.two_things_frac)
    pictures = painted(scenes, sampler.cfg.encoders.image_side_px)
    source = f"{len(scenes)} painted scenes that training never saw"
    return _encoded_now(sampler, [caption(scene) for scene in scenes], pictures, source)


def _encoded_now(sampler: Sampler, captions: Sequence[str], pictures: Pixels, source: str) -> Pairs:
    """Encode ``(N, H, W, 3)`` pictures and their captions with the run's encoders."""
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2)

    def moments(batch: torch.Tensor) -> torch.Tensor:
        pixels = batch.to(sampler.device).float() / 127.5 - 1.0
        return torch.stack(sampler.autoencoder.moments(pixels), dim=1).cpu()

    with one_core_workers(sampler.threads) as workers:
        found = torch.cat(list(workers.map(moments, torch.split(tensor, RECONSTRUCTION_BATCH))))
    texts = [state.cpu() for state in sampler.text.encode(captions)]
    return Pairs(normalised(sampler, found), texts, source)
