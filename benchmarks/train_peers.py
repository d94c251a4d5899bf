"""Training steps of others, that `benchmarks.train_rank` takes in turn with those of Kiln."""

from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, BertModel

from benchmarks.encode import read_square
from trainer.build import build_model
from trainer.config import TrainConfig
from trainer.data.sources import LatentBatch
from trainer.datasets import find_datasets
from trainer.feed import open_feed
from trainer.models.locations import locate
from trainer.runtime.comm import Comm

IN_MEMORY = 8
"""Micro-batches that the bare loops go round."""

Step = Callable[[], object]


def make_step(peer: str, cfg: TrainConfig, comm: Comm, files: Path | None) -> Step:
    """Build a peer's network and optimizer, and return what takes one step.

    Args:
        peer: bare, ddp, deepspeed, or diffusers-N with N worker processes.
        cfg: Of Kiln's run: network, optimizer, batch.
        comm: Of all ranks.
        files: Folder of pictures and captions, for diffusers.
    """
    if peer.startswith("diffusers-"):
        assert files is not None
        return _diffusers_step(cfg, files, num_workers=int(peer.rpartition("-")[2]))
    network = build_model(cfg)
    params = list(network.parameters())
    adam = _adam(cfg, params)
    batches = cycle(list(islice(_batches(cfg, comm), IN_MEMORY)))
    if peer == "deepspeed":
        return _deepspeed_step(network, adam, cfg, batches)
    if peer == "ddp":
        network = nn.parallel.DistributedDataParallel(network)

    def step() -> None:
        torch.autograd.backward(_flow_loss(network, next(batches)))
        nn.utils.clip_grad_norm_(params, cfg.optim.clip_grad_norm)
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step


def _adam(cfg: TrainConfig, params: list[nn.Parameter]) -> torch.optim.AdamW:
    optim = cfg.optim
    return torch.optim.AdamW(
        params, optim.learning_rate, optim.betas, weight_decay=optim.weight_decay, fused=True
    )


def _deepspeed_step(
    network: nn.Module,
    adam: torch.optim.Optimizer,
    cfg: TrainConfig,
    batches: Iterator[LatentBatch],
) -> Step:
    import deepspeed  # noqa: PLC0415 - Comm chooses the accelerator before the first import

    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=adam,
        config={
            "train_batch_size": cfg.batch.global_batch_images,
            "train_micro_batch_size_per_gpu": cfg.batch.micro_batch_images,
            "gradient_clipping": cfg.optim.clip_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 1},
            "steps_per_print": 10**9,
        },
        dist_init_required=False,
    )

    def step() -> None:
        engine.backward(_flow_loss(engine, next(batches)))
        engine.step()

    return step


def _flow_loss(network: nn.Module, batch: LatentBatch) -> Tensor:
    latents = batch.mean_BCHW + (0.5 * batch.logvar_BCHW).exp() * torch.randn_like(batch.mean_BCHW)
    return _denoising_loss(network, latents, batch.text_BLD, batch.text_mask_BL)


def _denoising_loss(network: nn.Module, x0: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Rectified flow with logit-normal times, as short as it can be written."""
    noise = torch.randn_like(x0)
    t = torch.sigmoid(torch.randn(len(x0), 1, 1, 1))
    out: Tensor = network((1 - t) * x0 + t * noise, 1000 * t.flatten(), text, mask)
    return nn.functional.mse_loss(out, noise - x0)


def _batches(cfg: TrainConfig, comm: Comm) -> Iterator[LatentBatch]:
    feed = open_feed(cfg, find_datasets(cfg), comm, None)
    for batch in feed.batches(feed.begin(None)):
        assert isinstance(batch, LatentBatch)
        yield batch


class _Files(Dataset[tuple[Tensor, str]]):
    """Pictures and captions in files, read with Pillow."""

    def __init__(self, folder: Path, side_px: int) -> None:
        self._paths, self._side_px = sorted(folder.glob("*.jpg")), side_px

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[Tensor, str]:
        path = self._paths[number]
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        return read_square(path, self._side_px), caption


def _diffusers_step(cfg: TrainConfig, folder: Path, *, num_workers: int) -> Step:
    """Train in the manner of diffusers' train_text_to_image.py: accelerate, encoders, EMAModel."""
    accelerator = Accelerator(cpu=True)
    autoencoder = AutoencoderKL.from_pretrained(
        locate(cfg.encoders.autoencoder.path), low_cpu_mem_usage=False
    )
    text_folder = locate(cfg.encoders.text.path)
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    text = BertModel.from_pretrained(text_folder, add_pooling_layer=False)
    for frozen in (autoencoder, text):
        frozen.requires_grad_(False).eval()
    network = build_model(cfg)
    averages = EMAModel(network.parameters())
    loader: Any = DataLoader(
        _Files(folder, cfg.encoders.image_side_px),
        cfg.batch.micro_batch_images,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    adam = _adam(cfg, list(network.parameters()))
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda _: 1.0)
    network, adam, loader, rate = accelerator.prepare(network, adam, loader, rate)
    batches = (batch for _ in cycle([None]) for batch in loader)

    def step() -> float:
        pictures, captions = next(batches)
        tokens = tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=cfg.encoders.text.max_tokens,
            return_tensors="pt",
        )
        with accelerator.accumulate(network):
            latents = autoencoder.encode(pictures).latent_dist.sample()
            latents = latents * autoencoder.config.scaling_factor
            states = text(**tokens).last_hidden_state
            mask = tokens["attention_mask"].bool()
            loss = _denoising_loss(network, latents, states, mask)
            shown = accelerator.gather(loss.repeat(len(pictures))).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), cfg.optim.clip_grad_norm)
            adam.step()
            rate.step()
            adam.zero_grad()
        averages.step(network.parameters())
        return float(shown.item())

    return step
