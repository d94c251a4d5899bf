"""Draw pictures with a denoiser that Kiln trained, where diffusers' own pipelines would differ.

A caption is encoded as in training: alone, without padding (or, if so trained, padded to the full
length), its states then padded with zeros and masked in the network. The folder of an export holds
a copy of this file, named pipeline.py; it needs torch, diffusers and transformers alone.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class KilnPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Text to picture: captions -> states -> latents by the scheduler's steps -> pixels."""

    model_cpu_offload_seq = "text_encoder->unet->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["unet", "transformer"]

    def __init__(
        self,
        vae: Any,  # noqa: ANN401 - diffusers and transformers are untyped
        text_encoder: Any,  # noqa: ANN401
        tokenizer: Any,  # noqa: ANN401
        scheduler: Any,  # noqa: ANN401
        unet: Any = None,  # noqa: ANN401
        transformer: Any = None,  # noqa: ANN401
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Take the parts: one of unet and transformer.

        Args:
            vae: First stage.
            text_encoder: Encoder of captions.
            tokenizer: Its tokenizer.
            scheduler: Steps from noise to latents.
            unet: Denoiser.
            transformer: Denoiser.
            settings: max_tokens, padding (none or max) and pooled_tokens as in training;
                network_time, the factor and offset from the scheduler's times to the network's;
                latents_mean and latents_std, where the vae does not know them.
        """
        super().__init__()
        parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        parts |= {"scheduler": scheduler, "unet": unet, "transformer": transformer}
        self.register_modules(**parts)
        self.register_to_config(settings=settings)
        self.settings: dict[str, Any] = settings or {}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int = 20,
        guidance_scale: float = 4.0,
        latents: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw one picture per prompt.

        Args:
            prompt: One or several captions.
            negative_prompt: What guidance leads away from; for all prompts or for each.
            num_inference_steps: Steps of the scheduler.
            guidance_scale: Classifier-free guidance; 1 is none, at half the cost.
            latents: ``(B, C, H, W)`` standard normal noise; else drawn.
            generator: Draws it.
            output_type: pil, np, pt, or latent for the (normalised) latents.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        is_guided = guidance_scale != 1
        if is_guided:
            prompts += _one_each(negative_prompt, len(prompts))
        text_BLD, mask_BL = self.encode(prompts)
        net, device = self.unet or self.transformer, self._execution_device
        if latents is None:
            side, num_pictures = net.config.sample_size, len(prompts) // (1 + is_guided)
            shape = (num_pictures, net.config.in_channels, side, side)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=net.dtype)
        x = latents.to(device, net.dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for t in self.progress_bar(self._timesteps(num_inference_steps)):
            both = torch.cat([x, x]) if is_guided else x
            if hasattr(self.scheduler, "scale_model_input"):
                both = self.scheduler.scale_model_input(both, t)
            prediction = self._predict(both, t, text_BLD, mask_BL)
            if is_guided:
                with_text, without = prediction.chunk(2)
                prediction = without + guidance_scale * (with_text - without)
            x = self.scheduler.step(prediction, t, x, return_dict=False)[0]
        pictures = x if output_type == "latent" else self._decode(x)
        return ImagePipelineOutput(
            images=VaeImageProcessor(do_resize=False).postprocess(pictures, output_type)
        )

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return text states ``(B, L, D)``, zeros where there is no token, and their mask."""
        options = {
            "truncation": True,
            "max_length": self.settings["max_tokens"],
            "padding": "max_length" if self.settings["padding"] == "max" else "do_not_pad",
            "return_tensors": "pt",
        }
        states = []
        for prompt in prompts:
            ids = self.tokenizer(prompt, **options).input_ids.to(self._execution_device)
            states.append(self.text_encoder(input_ids=ids).last_hidden_state[0])
        lengths_B = torch.tensor([len(state_LD) for state_LD in states], device=states[0].device)
        text_BLD = pad_sequence(states, batch_first=True)
        missing = max(0, self.settings["pooled_tokens"] - text_BLD.shape[1])
        text_BLD = torch.nn.functional.pad(text_BLD, (0, 0, 0, missing))
        numbers_L = torch.arange(text_BLD.shape[1], device=text_BLD.device)
        return text_BLD, numbers_L[None] < lengths_B[:, None]

    def _timesteps(self, num_steps: int) -> Tensor:
        device = self._execution_device
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # Its own steps end at 1/1000 before they jump to 0; these are evenly spaced.
            sigmas = np.linspace(1, 1 / num_steps, num_steps)
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            self.scheduler.set_timesteps(num_steps, device=device)
        timesteps: Tensor = self.scheduler.timesteps
        return timesteps

    def _predict(self, x: Tensor, t: Tensor, text_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        net = self.unet or self.transformer
        extras: dict[str, Any] = {}
        if self.transformer is not None:
            extras["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        scale, offset = self.settings["network_time"]
        predicted: Tensor = net(
            x,
            timestep=(scale * t + offset).expand(len(x)),
            encoder_hidden_states=text_BLD.to(net.dtype),
            encoder_attention_mask=mask_BL,
            **extras,
        ).sample
        return predicted

    def _decode(self, latents: Tensor) -> Tensor:
        if self.settings["latents_mean"] is not None:
            std, mean = (
                latents.new_tensor(self.settings[key])[:, None, None]
                for key in ("latents_std", "latents_mean")
            )
            latents = latents * std + mean
        pictures: Tensor = self.vae.decode(latents.to(self.vae.dtype)).sample
        return pictures


def _one_each(negative_prompt: str | Sequence[str], num_prompts: int) -> list[str]:
    if isinstance(negative_prompt, str):
        return [negative_prompt] * num_prompts
    if len(negative_prompt) != num_prompts:
        raise ValueError(
            f"got {len(negative_prompt)} negative prompts for {num_prompts} prompts. Give one for "
            "all, or one for each."
        )
    return list(negative_prompt)
