from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fxprune.cli.request import Request
from fxprune.data.batches import batches
from fxprune.data.images import make_scaling, read_image
from fxprune.errors import InputError
from fxprune.graph.trace import trace
from fxprune.models.compat import enable_torchvision
from fxprune.models.preprocessing import preprocessing_of

enable_torchvision()
SIZES = ((300, 200), (200, 301), (97, 64), (256, 256), (40, 500))  # width, height


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Smooth pictures with noise, of several sizes, in two classes."""
    random = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate(SIZES):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        ramp = np.linspace(0, 200, width)[None, :, None] * np.ones((height, 1, 3))
        noise = random.integers(0, 56, (height, width, 3))
        Image.fromarray((ramp + noise).astype(np.uint8)).save(path)
        paths.append(path)
    return paths


def images(arch: str, photos: list[Path], **options: Any) -> list[torch.Tensor]:
    scaling = make_scaling(preprocessing_of(arch, options))
    return [scaling(read_image(path, scaling)[None])[0] for path in photos]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet50", "IMAGENET1K_V1"),
        ("resnet50", "ResNet50_Weights.IMAGENET1K_V2"),
        ("inception_v3", "DEFAULT"),
        ("swin_v2_t", "IMAGENET1K_V1"),
        ("regnet_y_128gf", "IMAGENET1K_SWAG_E2E_V1"),
    ],
)
def test_torchvision_prepares_images_alike(name: str, weights: str, photos: list[Path]) -> None:
    known = importlib.import_module("torchvision.models").get_model_weights(name)
    preset = known[weights.rpartition(".")[2]].transforms()
    for path, found in zip(
        photos, images(f"torchvision:{name}", photos, weights=weights), strict=True
    ):
        torch.testing.assert_close(
            found, preset(Image.open(path).convert("RGB")), atol=2e-6, rtol=0
        )


@pytest.mark.parametrize(
    "name",
    ["resnet50.a1_in1k", "vit_tiny_patch16_224", "mobilenetv2_100.ra_in1k", "tf_efficientnet_b0"],
)
def test_timm_prepares_images_alike(name: str, photos: list[Path]) -> None:
    check_timm(name, photos)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_every_crop_mode_of_timm_is_known(mode: str, photos: list[Path]) -> None:
    timm = importlib.import_module("timm")
    entry = importlib.import_module("timm.models").get_pretrained_cfg
    names = (name for name in timm.list_models() if (cfg := entry(name)) and cfg.crop_mode == mode)
    check_timm(next(names), photos)


def check_timm(name: str, photos: list[Path]) -> None:
    data = importlib.import_module("timm.data")
    config = importlib.import_module("timm.models").get_pretrained_cfg(name).to_dict()
    preset = data.create_transform(**data.resolve_data_config({}, pretrained_cfg=config))
    for path, found in zip(photos, images(f"timm:{name}", photos), strict=True):
        expected = preset(Image.open(path).convert("RGB"))
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_the_two_weights_of_a_model_differ_and_the_default_is_reported_as_assumed() -> None:
    first, second, unnamed = (
        preprocessing_of("torchvision:resnet50", {"weights": name} if name else {})
        for name in ("IMAGENET1K_V1", "IMAGENET1K_V2", None)
    )
    assert first is not None
    assert second is not None
    assert unnamed is not None
    assert (first.resize, second.resize) == ((256, 256), (232, 232))
    assert (unnamed.resize, unnamed.assumed, second.assumed) == (second.resize, True, False)
    by_file = preprocessing_of("torchvision:resnet50", {}, "resnet50-0676ba61.pth")
    assert by_file == first


def test_options_of_the_architecture_change_the_input() -> None:
    smaller = preprocessing_of("timm:vit_tiny_patch16_224", {"img_size": 96, "in_chans": 1})
    assert smaller is not None
    assert (smaller.size, smaller.resize, smaller.mean) == ((96, 96), (106, 106), (0.5,))


def test_other_models_say_nothing() -> None:
    for arch in (None, "mine:net", "torchvision:nothing", "torchvision:r3d_18", "timm:nothing"):
        assert preprocessing_of(arch, {}) is None


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(InputError, match=r"no weights 'IMAGENET1K_V3'; did you mean IMAGENET1K_V"):
        preprocessing_of("torchvision:resnet50", {"weights": "IMAGENET1K_V3"})


def loaded(photos: list[Path], model: Any = None, **fields: Any) -> tuple[torch.Size, str]:
    """The shape of a batch and the notes of data that a request names."""
    data = Request("w.pt", data=str(photos[0].parent.parent), **fields).load_data(0, model)
    assert data is not None
    return next(batches(data.calibration, 4)).inputs[0].shape[1:], " ".join(data.notes)


def test_photos_of_several_sizes_need_no_option(photos: list[Path]) -> None:
    shape, notes = loaded(photos, arch="torchvision:resnet50")
    assert shape == (3, 224, 224)
    assert (
        "images are resized to cover 232x232 (bilinear), cropped to 224x224 and normalised with "
        "mean 0.485,0.456,0.406 and std 0.229,0.224,0.225: what no option sets is read from "
        "torchvision's ResNet50_Weights.IMAGENET1K_V2 (assumed, since no weights are named)"
    ) in notes
    shape, notes = loaded(photos, arch="timm:vit_tiny_patch16_224")
    assert "mean 0.5,0.5,0.5 and std 0.5,0.5,0.5" in notes


def test_options_override_what_the_library_says(photos: list[Path]) -> None:
    fields: dict[str, Any] = {"image_size": "96", "crop": 0.5, "interpolation": "nearest"}
    shape, notes = loaded(photos, arch="torchvision:resnet18", mean="0.1", std="0.2", **fields)
    assert shape == (3, 96, 96)
    assert "cover 192x192 (nearest), cropped to 96x96 and normalised with mean 0.1" in notes
    shape, notes = loaded(photos, arch="torchvision:resnet18", image_size="112")
    assert "cover 128x128 (bilinear), cropped to 112x112" in notes
    assert loaded(photos, arch="torchvision:resnet18", input_shape="3,64,48")[0] == (3, 64, 48)


def test_a_program_says_its_size(photos: list[Path]) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())
    program = trace(net, (torch.randn(2, 3, 20, 24),))
    assert loaded(photos, program)[0] == (3, 20, 24)
    with pytest.raises(InputError, match="--image-size"):
        loaded(photos)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"crop": 1.5}, "--crop is 1.5"), ({"interpolation": "cubic"}, "--interpolation cubic")],
)
def test_wrong_options_are_refused(photos: list[Path], fields: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        loaded(photos, arch="torchvision:resnet18", **fields)
