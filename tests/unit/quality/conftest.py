"""Networks for features, loaded once."""

import pytest

from tests.tiny_encoders import save_clip_model
from trainer.config_quality import ClipFeaturesConfig, EfficientNetConfig
from trainer.quality.features import load_features


def efficientnet(*, side_px, batch_images=16):
    cfg = EfficientNetConfig(kind="efficientnet_lite0", side_px=side_px)
    return load_features(cfg, device="cpu", batch_images=batch_images)


@pytest.fixture(scope="session")
def small_efficientnet():
    return efficientnet(side_px=64)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return save_clip_model(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def tiny_clip(clip_folder):
    cfg = ClipFeaturesConfig(kind="clip", path=str(clip_folder))
    return load_features(cfg, device="cpu", batch_images=4)
