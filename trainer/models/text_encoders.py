"""Captions -> states, by pretrained BERT, CLIP and T5 encoders.

Captions are grouped by their exact number of tokens, so no padding enters an encoder: a caption's
states do not depend on its neighbours, whatever the family's padding rules. With padding=max every
caption has the same number of tokens, and padding is read like words: what diffusers'
StableDiffusionPipeline does, which gives its encoder no mask.

Letters: ``B`` captions, ``L`` tokens, ``D`` width of a state.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel, CLIPTextModel, T5EncoderModel
from transformers.utils import logging as transformers_logging

from trainer.config import TextEncoderConfig
from trainer.errors import BadInput
from trainer.models.loading import load_frozen
from trainer.models.locations import locate
from trainer.models.parallel import one_core_workers

TOKENS_PER_BATCH = 2048

_CLASSES = {
    "bert": (BertModel, {"add_pooling_layer": False}),
    "clip": (CLIPTextModel, {}),
    "t5": (T5EncoderModel, {}),
}


class TextEncoder:
    """A frozen encoder with its tokenizer."""

    def __init__(
        self,
        net: Any,  # noqa: ANN401 - transformers is untyped
        tokenizer: Any,  # noqa: ANN401
        *,
        max_tokens: int,
        padded: bool = False,
    ) -> None:
        self.net, self.tokenizer = net, tokenizer
        self.max_tokens = max_tokens
        self._padding = "max_length" if padded else "do_not_pad"
        self.width: int = net.config.hidden_size

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Return token ids, special ones included, cut or padded to `max_tokens`."""
        if not captions:
            return []
        ids: list[list[int]] = self.tokenizer(
            list(captions),
            truncation=True,
            max_length=self.max_tokens,
            padding=self._padding,
        )["input_ids"]
        return ids

    def split(self, caption: str) -> tuple[str, str]:
        """Return the part of a caption that is read, and the part that `max_tokens` cuts off."""
        whole = self.tokenizer(caption, return_offsets_mapping=True)
        if len(whole["input_ids"]) <= self.max_tokens:
            return caption, ""
        read = self.tokenizer(
            caption, truncation=True, max_length=self.max_tokens, return_offsets_mapping=True
        )
        end = max(stop for _, stop in read["offset_mapping"])
        return caption[:end], caption[end:]

    @torch.inference_mode()
    def states(self, ids_BL: Tensor) -> Tensor:
        """Return ``(B, L, D)`` float32 last hidden states of captions of equal length."""
        found: Tensor = self.net(input_ids=ids_BL.to(self.net.device)).last_hidden_state
        return found

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Return one ``(L_i, D)`` float32 tensor per caption; equal captions are encoded once."""
        with one_core_workers(1) as workers:
            found = dict(self.encode_each(captions, workers))
        return [found[caption] for caption in captions]

    def encode_each(
        self, captions: Sequence[str], workers: Executor
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (caption, states) for each distinct caption, shortest first.

        Args:
            captions: In any order; which of them share a batch depends on their set alone.
            workers: Run the batches.
        """
        unique = sorted(set(captions))
        ids = self.tokens(unique)
        order = sorted(range(len(unique)), key=lambda i: (len(ids[i]), unique[i]))
        batches: list[list[int]] = []
        for length, group in groupby(order, key=lambda i: len(ids[i])):
            rows, size = list(group), max(1, TOKENS_PER_BATCH // length)
            batches += [rows[start : start + size] for start in range(0, len(rows), size)]

        def run(batch: list[int]) -> Tensor:
            return self.states(torch.tensor([ids[i] for i in batch])).cpu()

        for batch, states in zip(batches, workers.map(run, batches), strict=True):
            yield from zip((unique[i] for i in batch), states, strict=True)

    def to(self, device: torch.device) -> "TextEncoder":
        """Move to a device."""
        self.net.to(device)
        return self


def load_text_encoder(cfg: TextEncoderConfig) -> TextEncoder:
    """Load a pretrained text encoder in float32, frozen, and its tokenizer.

    Raises:
        BadInput: There is no such folder or package, it holds something else, or it cannot
            read `max_tokens` tokens, or not pad them.
        BadWorld: The model hub did not give it.
    """
    cls, options = _CLASSES[cfg.kind]
    with quiet_transformers():
        net = load_frozen(cls, locate(cfg.path, cfg.subfolder), **options)
    positions = getattr(net.config, "max_position_embeddings", cfg.max_tokens)
    if cfg.max_tokens > positions:
        raise BadInput(
            f"encoders.text.max_tokens={cfg.max_tokens}, but {cfg.path} reads {positions} tokens. "
            f"Try encoders.text.max_tokens={positions}."
        )
    tokenizer = _load_tokenizer(locate(cfg.path, cfg.tokenizer_subfolder))
    if cfg.padding == "max" and tokenizer.pad_token is None:
        raise BadInput(
            f"encoders.text.padding=max, but the tokenizer of {cfg.path} has no token to pad with. "
            "Give encoders.text.padding=none."
        )
    return TextEncoder(net, tokenizer, max_tokens=cfg.max_tokens, padded=cfg.padding == "max")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the bar and the table of unused weights; missing ones are an error of ours."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _load_tokenizer(folder: Path) -> Any:  # noqa: ANN401 - transformers is untyped
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(
            f"{folder} holds no tokenizer ({reason}). Set encoders.text.tokenizer_subfolder to "
            "where tokenizer.json or the vocabulary lies."
        ) from error
