"""What PyTorch itself counts and keeps for the real networks, on the meta device or on a CPU."""

from dataclasses import dataclass
from itertools import chain
from weakref import WeakSet

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from trainer.models.autoencoders import build_autoencoder
from trainer.models.denoisers import build_denoiser
from trainer.models.lora import add_adapters


def build(cfg, *, dtype=torch.float32, lora=None, device="meta"):
    with torch.device(device):
        net = (build_autoencoder if cfg.kind == "autoencoder_kl" else build_denoiser)(cfg)
        if lora is not None:
            add_adapters(net, cfg, lora, seed=0)
    return net.to(dtype).train()


def inputs(cfg, batch, height, width, tokens, device="meta"):
    """Of a forward pass, for latents of such sides."""
    latents = torch.zeros(batch, cfg.latent_channels, height, width, device=device)
    if cfg.kind == "autoencoder_kl":
        downscale = 2 ** (len(cfg.block_channels) - 1)
        pictures = torch.zeros(batch, 3, height * downscale, width * downscale, device=device)
        return pictures, latents
    return (
        latents,
        torch.zeros(batch, device=device),
        torch.zeros(batch, tokens, cfg.text_width, device=device),
        torch.ones(batch, tokens, dtype=torch.bool, device=device),
    )


def counted_flops(net, args, *, is_training=False):
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(is_training):
        out = net(*args)
        if is_training:
            out.sum().backward()
    return counter.get_total_flops()


def kept_bytes(net, make_inputs, *, recomputes=False):
    """Most bytes that are kept at a time, per image: the slope over the batch."""
    # One image alone has views where more have copies.
    few, many = (_most_kept(net, make_inputs(batch), recomputes) for batch in (2, 4))
    return (many - few) / 2


def _most_kept(net, args, recomputes):
    """Of blocks that would be recomputed, let only the inputs be kept once they have run."""
    kept, most = _Kept(net), 0

    def block(module, *args):
        nonlocal most
        inputs = [kept.pack(arg) for arg in args if isinstance(arg, torch.Tensor)]
        before = {*kept.tensors}
        out = module(*args)
        most = max(most, kept.bytes())
        kept.dropped.update(each for each in kept.tensors if each not in before)
        kept.inputs.extend(inputs)
        return out

    if recomputes:
        net.inner.enable_gradient_checkpointing(block)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda packed: packed.tensor):
        out = net(*args)  # with it lives what leads back from it
    most = max(most, kept.bytes())
    del out
    return most


@dataclass(eq=False)
class _Packed:
    tensor: torch.Tensor


class _Kept:
    """What autograd keeps, as long as it does; parameters do not count."""

    def __init__(self, net):
        self.tensors, self.dropped, self.inputs = WeakSet(), WeakSet(), []
        self._mine = {_memory(t) for t in chain(net.parameters(), net.buffers())}

    def pack(self, tensor):
        packed = _Packed(tensor.detach())  # itself it would keep what keeps it
        self.tensors.add(packed)
        return packed

    def bytes(self):
        """Count memory once that several tensors lie in."""
        kept = {_memory(each.tensor) for each in self.tensors if each not in self.dropped}
        return sum(size for _, size in kept - self._mine)


def _memory(tensor):
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def attend_as_gpus(patch):
    """On the meta device attention is written out; give it PyTorch's kernels for GPUs.

    Their shapes, that is. The flash kernel takes no mask.
    """
    patch.setattr(functional, "scaled_dot_product_attention", _attention_of_gpus)


def attend_as_cpus(patch):
    """The same with the flash kernel for CPUs."""
    patch.setattr(functional, "scaled_dot_product_attention", _attention_of_cpus)


def _attention_of_gpus(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, True)[0]


def _attention_of_cpus(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, attn_mask=attn_mask)[0]
