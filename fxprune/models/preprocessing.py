"""What images a library's model was trained on, read from the library itself."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from fxprune.errors import InputError
from fxprune.models.compat import enable_torchvision
from fxprune.models.factories import suggest

CropMode = Literal["center", "squash", "border"]
ROUNDING = 1e-9  # quotients of sizes and shares that would be whole but for it


@dataclass(frozen=True)
class Preprocessing:
    """How a library makes the images that a model takes, for evaluation.

    Attributes:
        size: height and width that the model takes.
        resize: height and width that images are brought to before they are cropped to ``size``.
        crop_mode: ``center`` covers ``resize`` and keeps the aspect, ``squash`` does not keep it,
            ``border`` fits the whole image into ``resize`` and fills the rest with the mean.
        interpolation: Pillow's name of the filter, in lower case.
        mean: per channel, for pixels scaled to [0, 1].
        std: likewise.
        source: where this was read.
        assumed: whether the user did not name the weights, so that the default ones are assumed.

    """

    size: tuple[int, int]
    resize: tuple[int, int]
    crop_mode: CropMode
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    assumed: bool

    def with_size(self, size: tuple[int, int]) -> Preprocessing:
        """Return the same for another input size: the crop keeps its share of the image."""
        shares = (own / before for own, before in zip(self.size, self.resize, strict=True))
        height, width = (
            math.floor(new / share + ROUNDING) for new, share in zip(size, shares, strict=True)
        )
        return replace(self, size=size, resize=(height, width))


def preprocessing_of(
    arch: str | None, options: Mapping[str, Any], weights_file: str = ""
) -> Preprocessing | None:
    """Return what the library of an architecture says of its images; None if it says nothing.

    Args:
        arch: ``torchvision:NAME`` or ``timm:NAME``; anything else has no such library.
        options: of the architecture; ``weights`` names torchvision's weights, ``in_chans`` and
            ``img_size`` or ``image_size`` change the input.
        weights_file: the file's name, which names the weights if they are torchvision's own file.

    Raises:
        InputError: ``weights`` names none of the model's weights.

    """
    library, _, name = (arch or "").partition(":")
    if library not in ("torchvision", "timm") or not name:
        return None
    enable_torchvision()
    try:
        importlib.import_module(library)
    except ImportError:
        return None  # building the model reports it
    read = _of_torchvision if library == "torchvision" else _of_timm
    found = read(name, options, weights_file)
    if found is None:
        return None
    size = options.get("img_size", options.get("image_size"))
    if isinstance(size, int):
        found = found.with_size((size, size))
    if options.get("in_chans") == 1:
        grey = sum(found.mean) / len(found.mean), sum(found.std) / len(found.std)
        found = replace(found, mean=grey[:1], std=grey[1:])
    return found


def _of_torchvision(
    name: str, options: Mapping[str, Any], weights_file: str
) -> Preprocessing | None:
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        return None
    known = {entry.name: entry for entry in models.get_model_weights(name)}
    wanted = options.get("weights")
    if isinstance(wanted, str) and wanted.rpartition(".")[2] not in {*known, "DEFAULT"}:
        raise InputError(
            f"torchvision's {name} has no weights {wanted!r}{suggest(wanted, list(known))}; "
            f"there are {', '.join(known)}"
        )
    default = models.get_model_weights(name).DEFAULT if known else None
    by_file = {Path(urlparse(entry.url).path).name: entry for entry in known.values()}
    if isinstance(wanted, str):
        entry, assumed = known.get(wanted.rpartition(".")[2], default), False
    else:
        entry, assumed = by_file.get(weights_file, default), weights_file not in by_file
    preset: Any = None if entry is None else entry.transforms()
    resize: list[int] = getattr(preset, "resize_size", [])
    if len(resize) != 1:
        return None  # of videos, or of detectors, which resize images themselves
    size = getattr(preset, "crop_size", resize)
    return Preprocessing(
        (size[0], size[0]), (resize[0], resize[0]), "center", preset.interpolation.value,
        tuple(preset.mean), tuple(preset.std), f"torchvision's {entry}", assumed,
    )  # fmt: skip


def _of_timm(name: str, options: Mapping[str, Any], weights_file: str) -> Preprocessing | None:
    data = importlib.import_module("timm.data")
    entry = importlib.import_module("timm.models").get_pretrained_cfg(name, allow_unregistered=True)
    if entry is None:
        return None
    config = data.resolve_data_config({}, pretrained_cfg=entry.to_dict())
    height, width = config["input_size"][1:]
    share, interpolation = config["crop_pct"], config["interpolation"]
    tag = f"{name.partition('.')[0]}.{entry.tag}" if entry.tag else name
    return Preprocessing(
        (height, width),
        (math.floor(height / share + ROUNDING), math.floor(width / share + ROUNDING)),
        config["crop_mode"],
        "bilinear" if interpolation == "random" else interpolation,
        tuple(config["mean"]),
        tuple(config["std"]),
        f"timm's {tag}",
        assumed="." not in name,
    )
