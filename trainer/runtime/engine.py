"""DeepSpeed behind the calls that the loop makes: forward, backward, step, fragments."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.config_engine import EngineConfig, OptimConfig
from trainer.errors import BadInput
from trainer.plan import Plan
from trainer.plan_memory import LIVE_PART, MAX_BUCKET_NUMBERS
from trainer.runtime import shortcuts
from trainer.runtime.comm import Comm
from trainer.runtime.fragments import FragmentReader


def clips_itself(cfg: EngineConfig) -> bool:
    """Say whether gradients are clipped here: DeepSpeed would go through them one by one."""
    return cfg.zero_stage == 0 and cfg.precision == "fp32"


def adds_in_place(cfg: TrainConfig) -> bool:
    """Say whether gradients are added up over the ranks where they are.

    On GPUs they are reduced on a stream of its own while backward goes on, from a bucket.
    """
    engine = cfg.engine
    return cfg.cluster.device == "cpu" and engine.zero_stage == 1 and engine.offload == "none"


def adds_in_bucket(cfg: TrainConfig) -> bool:
    """Say whether a bucket of gradients is added up where it lies, and not a copy of it.

    gloo's threads hold such a copy for a while longer, while the next tensors are made.
    """
    engine = cfg.engine
    return cfg.cluster.device == "cpu" and engine.zero_stage == 2 and engine.precision == "fp32"


def deepspeed_config(cfg: TrainConfig, plan: Plan) -> dict[str, Any]:
    """Return the DeepSpeed JSON of a run; it is written into the run directory too."""
    engine = cfg.engine
    on_host = {"device": "cpu", "pin_memory": cfg.cluster.device == "cuda"}
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        # Gathering small weights on demand keeps every parameter on the same path.
        "stage3_param_persistence_threshold": 0,
    }
    if engine.offload != "none":
        zero["offload_optimizer"] = on_host
    if engine.offload == "all":
        zero["offload_param"] = on_host
    if engine.zero_stage:
        # The bucket that gradients are copied into. DeepSpeed's own would hold 2 GB.
        zero["reduce_bucket_size"] = min(cfg.num_parameters, MAX_BUCKET_NUMBERS)
        zero["overlap_comm"] = cfg.cluster.device == "cuda"
        zero["reduce_scatter"] = not adds_in_bucket(cfg)
    if engine.zero_stage == 3:
        # DeepSpeed's own limits, 10^9 weights, would keep most networks gathered as a whole.
        live = cfg.num_parameters // LIVE_PART
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = live
        bucket = min(live, MAX_BUCKET_NUMBERS)
        zero["stage3_prefetch_bucket_size"] = zero["reduce_bucket_size"] = bucket
    zero["contiguous_gradients"] = not adds_in_place(cfg)
    half = engine.precision != "fp32"
    return {
        "train_batch_size": cfg.batch.global_batch_images,
        "train_micro_batch_size_per_gpu": cfg.batch.micro_batch_images,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": 0.0 if clips_itself(engine) else cfg.optim.clip_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": engine.precision == "bf16"},
        "fp16": {"enabled": engine.precision == "fp16"},
        # gloo cannot add bf16.
        "communication_data_type": "fp32" if half and cfg.cluster.device == "cpu" else None,
        "steps_per_print": 10**9,
    }


def build_optimizer(cfg: OptimConfig, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the optimizer that DeepSpeed shards."""
    if cfg.kind == "adafactor":
        # As torch has it: the step is relative to each tensor's size, and decays by itself.
        return torch.optim.Adafactor(
            params, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, foreach=True
        )
    return torch.optim.AdamW(
        params,
        lr=cfg.learning_rate,
        betas=cfg.betas,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        fused=True,
    )


class Engine:
    """A network under ZeRO, and its optimizer."""

    def __init__(self, model: nn.Module, cfg: TrainConfig, plan: Plan, comm: Comm) -> None:
        """Wrap `model`; its weights must already be equal on all ranks.

        Raises:
            BadInput: The device cannot compute in the precision asked for.
        """
        # Comm chooses the accelerator before the first import.
        import deepspeed  # noqa: PLC0415
        from deepspeed.accelerator import get_accelerator  # noqa: PLC0415

        if cfg.engine.precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise BadInput(
                f"engine.precision=fp16, and DeepSpeed computes no fp16 on this "
                f"{cfg.cluster.device}. Try engine.precision=fp32, or bf16."
            )
        prepare(model, cfg.engine)
        params = [param for param in model.parameters() if param.requires_grad]
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(cfg.optim, params),
            config=deepspeed_config(cfg, plan),
            dist_init_required=False,
        )
        if cfg.engine.zero_stage in {1, 2}:
            self._shorten(cfg)
        # One rank has nobody to add its gradients to: without copying them to and fro.
        self._engine.enable_backward_allreduce = comm.world > 1 or cfg.engine.zero_stage > 0
        self._is_fp16 = cfg.engine.precision == "fp16"
        self._clipped = params if clips_itself(cfg.engine) else []
        self._clip_grad_norm = cfg.optim.clip_grad_norm
        self._grad_norm: Tensor | None = None
        self.fragments = FragmentReader(self._engine, rank=comm.rank, world=comm.world)

    def _shorten(self, cfg: TrainConfig) -> None:
        """Leave out what DeepSpeed does in every step and need not."""
        zero = self._engine.optimizer
        shortcuts.keep_views(zero)
        shortcuts.norms_at_once(zero)
        if cfg.cluster.device == "cpu":
            shortcuts.gather_by_broadcast(sys.modules[type(zero).__module__])
        if adds_in_place(cfg) and cfg.engine.precision == "fp32":
            shortcuts.reduce_to_owners(zero)

    @property
    def model(self) -> nn.Module:
        """The network as the objective calls it."""
        return self._engine  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""
        self._engine.backward(loss)

    def micro_step(self) -> None:
        """Close one micro-batch; the last one of a step reduces, clips and updates the weights."""
        if self._clipped and self._engine.is_gradient_accumulation_boundary():
            self._grad_norm = nn.utils.clip_grad_norm_(self._clipped, self._clip_grad_norm)
        self._engine.step()

    def set_learning_rate(self, rate: float) -> None:
        """Use `rate` from the next update on."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last update, before clipping."""
        norm = self._engine.get_global_grad_norm() if self._grad_norm is None else self._grad_norm
        return float(norm or 0.0)

    @property
    def overflowed(self) -> bool:
        """Whether the last step changed nothing, because a gradient overflowed in fp16."""
        return self._is_fp16 and not self._engine.was_step_applied()


def prepare(model: nn.Module, cfg: EngineConfig) -> None:
    """Choose kernels and layouts before the network is wrapped; PyTorch's switches are global."""
    if cfg.attention != "auto":
        for name in ("math", "flash", "mem_efficient", "cudnn"):
            wanted = name == {"efficient": "mem_efficient"}.get(cfg.attention, cfg.attention)
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(wanted)
    if cfg.channels_last:
        model.register_forward_pre_hook(_channels_last, with_kwargs=False)
    if cfg.compile:
        compile_blocks(model)


def compile_blocks(model: nn.Module) -> None:
    """Compile what repeats, block by block: one compilation serves all blocks of a kind."""
    repeated = {"BasicTransformerBlock", "ResnetBlock2D"}
    for module in model.modules():
        if type(module).__name__ in repeated:
            module.compile()


def _channels_last(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        arg.contiguous(memory_format=torch.channels_last)
        if isinstance(arg, Tensor) and arg.ndim == 4
        else arg
        for arg in args
    )
