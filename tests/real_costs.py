"""What PyTorch itself counts and keeps for the real networks, on the meta device or on a CPU."""

from itertools import chain

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
    with FlopCounterMode(display=False) as counter:
        out = net(*args)
        if is_training:
            out.sum().backward()
    return counter.get_total_flops()


def kept_bytes(net, make_inputs, *, recomputes=False):
    """Most bytes that are kept at a time, per image: the slope over the batch."""
    most = _most_kept_recomputing if recomputes else _kept
    # One image alone has views where more have copies.
    few, many = (most(net, make_inputs(batch)) for batch in (2, 4))
    return (many - few) / 2


class _Kept:
    """Memory that autograd keeps, each once; parameters are not counted."""

    def __init__(self, net):
        self.bytes, self._alive = {}, []
        self._mine = {_key(t) for t in chain(net.parameters(), net.buffers())}

    def pack(self, tensor):
        if _key(tensor) not in self._mine:
            self.bytes[_key(tensor)] = tensor.untyped_storage().nbytes()
            self._alive.append(tensor)
        return tensor

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def total(self):
        return sum(self.bytes.values())


def _key(tensor):
    return tensor.untyped_storage()._cdata


def _kept(net, args):
    kept = _Kept(net)
    with kept.hooks():
        net(*args)
    return kept.total()


def _most_kept_recomputing(net, args):
    """Run the blocks that would be recomputed, and forget what they keep but their inputs."""
    kept, most = _Kept(net), 0

    def block(module, *args):
        nonlocal most
        for arg in args:
            if isinstance(arg, torch.Tensor):
                kept.pack(arg)
        before = dict(kept.bytes)
        out = module(*args)
        most, kept.bytes = max(most, kept.total()), before
        return out

    net.inner.enable_gradient_checkpointing(block)
    with kept.hooks():
        net(*args)
    return max(most, kept.total())


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
