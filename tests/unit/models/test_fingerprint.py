"""What changes an encoding's name, and what does not."""

import shutil

import pytest

from trainer.config import EncodersConfig
from trainer.errors import BadInput
from trainer.frozen import freeze
from trainer.models.fingerprint import identify


def encoders(kl, text, **changes):
    data = {
        "autoencoder": {"kind": "kl", "path": str(kl)},
        "text": {
            "kind": "t5",
            "path": str(text),
            "subfolder": "",
            "tokenizer_subfolder": "",
            "max_tokens": 12,
        },
        "image_side_px": 64,
    }
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        node = data
        for part in path:
            node = node[part]
        node[last] = value
    return freeze(EncodersConfig, data)


def test_the_place_of_the_weights_does_not_matter(kl_folder, t5_folder, tmp_path):
    here = identify(encoders(kl_folder, t5_folder))
    kl, t5 = (shutil.copytree(f, tmp_path / f.name) for f in (kl_folder, t5_folder))
    there = identify(encoders(kl, t5))
    assert here.fingerprint == there.fingerprint
    assert len(here.fingerprint) == 16
    assert there.facts["paths"] == {"autoencoder": str(kl), "text": str(t5)}


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "changed", ["diffusion_pytorch_model.safetensors", "model.safetensors", "tokenizer.json"]
)
def test_any_byte_of_weights_or_tokenizer_matters(changed, kl_folder, t5_folder, tmp_path):
    kl, t5 = (shutil.copytree(f, tmp_path / f.name) for f in (kl_folder, t5_folder))
    before = identify(encoders(kl, t5)).fingerprint
    (path,) = [f / changed for f in (kl, t5) if (f / changed).exists()]
    flip_last_byte(path)
    assert identify(encoders(kl, t5)).fingerprint != before


@pytest.mark.parametrize(
    "changes",
    [
        {"image_side_px": 32},
        {"text__max_tokens": 11},
        {"autoencoder__kind": "tiny"},
        {"text__padding": "max"},
    ],
)
def test_settings_matter(changes, kl_folder, t5_folder):
    before = identify(encoders(kl_folder, t5_folder)).fingerprint
    assert identify(encoders(kl_folder, t5_folder, **changes)).fingerprint != before


def test_no_padding_keeps_the_names_of_before_there_was_a_choice(kl_folder, t5_folder):
    facts = identify(encoders(kl_folder, t5_folder, text__padding="none")).facts
    assert set(facts["text"]) == {"kind", "files", "tokenizer", "max_tokens"}


def test_variants_that_are_not_loaded_do_not_matter(kl_folder, t5_folder, tmp_path):
    kl = shutil.copytree(kl_folder, tmp_path / "kl")
    before = identify(encoders(kl, t5_folder)).fingerprint
    (kl / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"other")
    (kl / "README.md").write_text("words")
    assert identify(encoders(kl, t5_folder)).fingerprint == before


def test_a_folder_without_weights_is_refused(t5_folder, tmp_path):
    with pytest.raises(BadInput, match="save_pretrained"):
        identify(encoders(tmp_path, t5_folder))
