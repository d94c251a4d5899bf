"""The smallest real training configuration, for tests that need one."""

from pathlib import Path
from typing import Any

import yaml

from trainer.config import TrainConfig
from trainer.frozen import freeze

SMALL_NETWORK = [
    "model=transformer_tiny",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.head_width=16",
    "batch.global_batch_images=8",
    "batch.micro_batch_images=4",
    "logging.every_steps=1",
    "logging.wandb=off",
]
"""The same as words for the commands."""


_CLUSTERS = Path(__file__).parents[1] / "conf/cluster"
SLURM = yaml.safe_load((_CLUSTERS / "_slurm.yaml").read_text())["slurm"]
"""What a site is asked for when nothing else is said."""


def tiny_config(**changes: Any) -> TrainConfig:
    """Freeze a tiny transformer's run; `changes` are dotted keys with '__' for dots."""
    data: dict[str, Any] = {
        "run": "runs/tiny",
        "seed": 1,
        "total_images": 64,
        "data": {
            "dataset": "none",
            "weight": 1.0,
            "mix": [],
            "reader": "kiln",
            "epoch_images": None,
            "order": "shards",
            "canonical_streams": None,
            "window_shards": 2,
            "ending": "roll",
            "threads": 1,
            "prefetch_batches": 2,
            "cache": None,
            "cache_gb": 1.0,
            "max_bad_frac": 0.01,
        },
        "encoders": {
            "autoencoder": {"kind": "kl", "path": "none"},
            "text": {
                "kind": "bert",
                "path": "none",
                "subfolder": "",
                "tokenizer_subfolder": "",
                "max_tokens": 32,
            },
            "image_side_px": 32,
        },
        "model": {
            "kind": "transformer",
            "latent_channels": 4,
            "latent_side": 4,
            "text_width": 16,
            "patch_side": 1,
            "num_layers": 1,
            "num_heads": 2,
            "head_width": 8,
            "num_parameters": 10_000,
        },
        "objective": {
            "kind": "denoising",
            "process": {"kind": "flow"},
            "prediction": "flow",
            "sigma_data": 1.0,
            "times": {"kind": "logit_normal", "mean": 0.0, "std": 1.0, "shift": 1.0},
            "loss": "squared_error",
            "weight": {"kind": "uniform", "gamma": 5.0, "k": 1.0, "bias": 2.0},
            "caption_dropout": 0.1,
        },
        "batch": {"global_batch_images": 8, "micro_batch_images": 2},
        "optim": {
            "kind": "adamw",
            "learning_rate": 1e-2,
            "betas": [0.9, 0.99],
            "eps": 1e-8,
            "weight_decay": 0.01,
            "clip_grad_norm": 1.0,
            "warmup_images": 0,
            "decay": "none",
        },
        "ema": {"half_life_images": [32], "warmup_ratio": 0.05, "power_sigma_rel": []},
        "engine": {
            "zero_stage": 1,
            "precision": "fp32",
            "offload": "none",
            "activation_checkpointing": False,
            "channels_last": False,
            "compile": False,
            "attention": "auto",
            "threads_per_rank": 1,
        },
        "cluster": {
            "kind": "local",
            "num_nodes": 1,
            "ranks_per_node": 1,
            "device": "cpu",
            "device_memory_gib": 1,
            "time_limit_min": 10,
            "warn_before_kill_s": 60,
        },
        "checkpoint": {
            "folder": None,
            "every_images": 16,
            "keep_last": 5,
            "keep_every_images": None,
            "keep_ema_every_images": None,
            "keep_best": None,
        },
        "rollback": {"max_tries": 3, "spike_sigmas": None, "window_steps": 16},
        "watchdog": {
            "timeout_s": 600.0,
            "first_step_timeout_s": 600.0,
            "slow_rank_ratio": 1.5,
        },
        "logging": {
            "every_steps": 1,
            "wandb": "off",
            "wandb_project": "kiln",
            "quiet": True,
            "tdp_w_per_core": 7.0,
        },
    }
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        node = data
        for part in path:
            node = node[part]
        node[last] = value
    return freeze(TrainConfig, data)
