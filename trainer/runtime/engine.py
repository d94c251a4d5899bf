"""DeepSpeed behind the four calls that the loop makes: forward, backward, step, fragments."""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.plan import Plan
from trainer.runtime.comm import Comm
from trainer.runtime.fragments import FragmentReader


def deepspeed_config(cfg: TrainConfig, plan: Plan) -> dict[str, Any]:
    """Return the DeepSpeed JSON of a run; it is written into the run directory too."""
    return {
        "train_batch_size": cfg.batch.global_batch_images,
        "train_micro_batch_size_per_gpu": cfg.batch.micro_batch_images,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": cfg.optim.clip_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": cfg.engine.zero_stage,
            # Gathering small weights on demand keeps every parameter on the same path.
            "stage3_param_persistence_threshold": 0,
        },
        "bf16": {"enabled": cfg.engine.precision == "bf16"},
        "steps_per_print": 10**9,
    }


class Engine:
    """A network under ZeRO with AdamW."""

    def __init__(self, model: nn.Module, cfg: TrainConfig, plan: Plan, comm: Comm) -> None:
        """Wrap `model`; its weights must already be equal on all ranks."""
        import deepspeed  # noqa: PLC0415 - Comm chooses the accelerator before the first import

        adam = torch.optim.AdamW(
            [param for param in model.parameters() if param.requires_grad],
            lr=cfg.optim.learning_rate,
            betas=cfg.optim.betas,
            eps=cfg.optim.eps,
            weight_decay=cfg.optim.weight_decay,
            fused=True,
        )
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=adam,
            config=deepspeed_config(cfg, plan),
            dist_init_required=False,
        )
        self.fragments = FragmentReader(self._engine, rank=comm.rank, world=comm.world)

    @property
    def model(self) -> nn.Module:
        """The network as the objective calls it."""
        return self._engine  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""
        self._engine.backward(loss)

    def micro_step(self) -> None:
        """Close one micro-batch; the last one of a step reduces, clips and updates the weights."""
        self._engine.step()

    def set_learning_rate(self, rate: float) -> None:
        """Use `rate` from the next update on."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last update, before clipping."""
        return float(self._engine.get_global_grad_norm() or 0.0)
