"""Laws of the distance in a network's features: the packaged one's, and a random VGG16's."""

import pytest
import torch

from trainer.config_first_stage import EfficientNetLossConfig, Vgg16LossConfig
from trainer.errors import BadInput
from trainer.quality.efficientnet import load_net
from trainer.quality.perceptual import EfficientNetDepths, Vgg16Depths, load_perceptual

CPU = torch.device("cpu")
# From torchvision's vgg16 and its published file: number of each convolution, and its channels.
NAMES = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256}
NAMES |= dict.fromkeys((17, 19, 21, 24, 26, 28), 512)
WIDTHS = (64, 128, 256, 512, 512)


def pictures(count=2, side_px=64):
    return (
        torch.rand(count, 3, side_px, side_px, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )


@pytest.fixture(scope="module")
def vgg_folder(tmp_path_factory):
    """Random weights under the names of torchvision's file, classifier included."""
    folder, state, before = tmp_path_factory.mktemp("vgg"), {}, 3
    torch.manual_seed(0)
    for number, width in NAMES.items():
        state[f"features.{number}.weight"] = torch.randn(width, before, 3, 3) / (4 * before) ** 0.5
        state[f"features.{number}.bias"] = torch.zeros(width)
        before = width
    torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, folder / "vgg16-397923af.pth")
    return folder


def vgg(folder, channel_weights=None):
    return load_perceptual(
        Vgg16LossConfig(
            kind="vgg16", weight=1.0, path=str(folder), channel_weights=channel_weights
        ),
        CPU,
    )


@pytest.fixture(scope="module", params=["efficientnet_lite0", "vgg16"])
def distance(request, vgg_folder):
    if request.param == "vgg16":
        return vgg(vgg_folder)
    return load_perceptual(EfficientNetLossConfig(kind="efficientnet_lite0", weight=1.0), CPU)


def test_equal_pictures_have_no_distance_and_worse_ones_more(distance):
    x = torch.nn.functional.interpolate(pictures(side_px=8), (64, 64), mode="bilinear")
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = [distance(x + sigma * noise, x) for sigma in (0, 0.1, 0.5)]
    assert (found[0] == 0).all()
    assert (found[1] > 0).all()
    assert (found[2] > found[1]).all()


def test_gradients_reach_the_reconstruction_and_no_weight(distance):
    ours, theirs = pictures().requires_grad_(), pictures().flip(0).requires_grad_()
    distance(ours, theirs).sum().backward()
    assert ours.grad.abs().sum() > 0
    assert ours.grad.isfinite().all()
    assert theirs.grad is None
    assert not any(param.requires_grad for param in distance._net.parameters())


@pytest.mark.parametrize(
    ("net", "widths", "first_side"),
    [
        (lambda: EfficientNetDepths(load_net().eval()), (16, 24, 40, 112, 320), 32),
        (Vgg16Depths, WIDTHS, 64),
    ],
)
def test_each_depth_has_half_the_side_of_the_one_before(net, widths, first_side):
    found = net()(pictures(1))
    assert tuple(each.shape[1] for each in found) == widths
    assert [each.shape[2] for each in found] == [first_side >> depth for depth in range(5)]


def test_the_last_depth_is_what_the_package_computes():
    net = load_net().eval()
    last = EfficientNetDepths(net)(pictures(1))[-1]
    torch.testing.assert_close(
        net._swish(net._bn1(net._conv_head(last))), net.extract_features(pictures(1))
    )


def test_learned_weights_of_channels_are_read_as_the_package_lpips_names_them(vgg_folder, tmp_path):
    x, y = pictures(), pictures().flip(0)
    names = {f"lin{depth}.model.1.weight": width for depth, width in enumerate(WIDTHS)}
    for factor in (1.0, 0.25):
        file = tmp_path / "vgg.pth"
        torch.save(
            {name: torch.full((1, width, 1, 1), factor) for name, width in names.items()}, file
        )
        weighted = vgg(vgg_folder, str(file))(x, y)
        torch.testing.assert_close(weighted, factor * vgg(vgg_folder)(x, y))


def test_other_files_are_refused(vgg_folder, tmp_path):
    with pytest.raises(BadInput, match=r"channel_weights=nowhere is no file\. Give weights/v0\.1"):
        vgg(vgg_folder, "nowhere")
    with pytest.raises(BadInput, match="another network"):
        vgg(vgg_folder, str(next(vgg_folder.iterdir())))
    with pytest.raises(BadInput, match="one file of weights"):
        vgg(tmp_path)
