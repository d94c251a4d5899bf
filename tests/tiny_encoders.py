"""Tiny, randomly initialised encoders, saved to folders as a hub would give them."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from data_prep.scenes import BACKGROUNDS, PLACES, SHAPES, SIZES, THING_COLOURS

WORDS = sorted(
    {
        *("a", "an", "on", "the", "background", "of", "above", "below", "to", ","),
        *(*BACKGROUNDS, *SHAPES, *SIZES, *THING_COLOURS),
        *(word for phrase, _ in PLACES.values() for word in phrase.split()),
    }
)


def save_tokenizer(folder, *, start, end):
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    single = " ".join(part for part in (start, "$A", end) if part)
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)


def save_clip(folder):
    """Laid out like Stable Diffusion: text_encoder/ and tokenizer/."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer", start="<s>", end="</s>")
    return folder


def save_clip_model(folder):
    """Both towers and the tokenizer in one folder; pictures of 32 px, embeddings of 16."""
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2}
    text = {"vocab_size": len(WORDS) + 4, "max_position_embeddings": 12, "eos_token_id": 2}
    text |= {"bos_token_id": 1, "pad_token_id": 0}
    vision = {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    save_tokenizer(folder, start="<s>", end="</s>")
    return folder


def save_t5(folder):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(WORDS) + 4, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    T5EncoderModel(config).save_pretrained(folder)
    save_tokenizer(folder, start="", end="</s>")
    return folder


def save_kl(folder):
    """4 channels, 2 pixels per latent row."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
    ).save_pretrained(folder)
    return folder


def save_tiny(folder):
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    ).save_pretrained(folder)
    return folder
