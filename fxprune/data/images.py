"""Images: folders of image files, and the normalisation of pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fxprune.errors import InputError
from fxprune.graph.notebook import plural
from fxprune.models.preprocessing import ROUNDING, CropMode, Preprocessing

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"})
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Scaling:
    """How images become what a model takes: resized and cropped, then scaled and normalised.

    Pixels are divided by 255, less ``mean``, divided by ``std``.

    Attributes:
        size: height and width that image files are cropped to; None keeps theirs.
        mean: per channel, after the division; one value serves for all channels. None stands
            for ImageNet's where there are three channels, else for 0.
        std: likewise; None stands for ImageNet's, else for 1.
        resize: height and width that image files are brought to first; None stands for ``size``.
        crop_mode: ``center`` covers ``resize``, ``squash`` changes the aspect to it, ``border``
            fits images into it and fills the rest with the mean.
        interpolation: the filter: nearest, box, bilinear, hamming, bicubic or lanczos.
        source: whose choice this is, for notes; None where every value is the user's or a default.

    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: tuple[int, int] | None = None
    crop_mode: CropMode = "center"
    interpolation: str = "bilinear"
    source: str | None = None

    def __post_init__(self) -> None:
        if self.interpolation.upper() not in Image.Resampling.__members__:
            known = ", ".join(name.lower() for name in Image.Resampling.__members__)
            raise InputError(
                f"--interpolation {self.interpolation} is not a filter; there are {known}"
            )

    def fit(self, image: Image.Image) -> Image.Image:
        """Resize and crop an image to ``size``."""
        if self.size is None:
            return image
        image = self._resized(image, self.resize or self.size)
        height, width = self.size
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        if image.height >= height and image.width >= width:
            return image.crop((left, top, left + width, top + height))
        channels = len(image.getbands())
        fill = tuple(round(255 * value) for value in self.constants(channels)[0])
        around = Image.new(image.mode, (width, height), fill if channels > 1 else fill[0])
        around.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return around

    def _resized(self, image: Image.Image, to: tuple[int, int]) -> Image.Image:
        height, width = to
        if self.crop_mode == "squash":
            shape = width, height
        elif self.crop_mode == "center" and height == width:  # the shorter side, as torchvision
            long = int(height * max(image.size) / min(image.size))
            shape = (height, long) if image.width <= image.height else (long, height)
        else:
            ratios = image.height / height, image.width / width
            ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
            shape = round(image.width / ratio), round(image.height / ratio)
        if shape == image.size:
            return image
        return image.resize(shape, Image.Resampling[self.interpolation.upper()])

    def describe(self, channels: int) -> str:
        """Say what is done to images of so many channels, in words."""
        mean, std = (",".join(f"{v:.4g}" for v in part) for part in self.constants(channels))
        steps = f"normalised with mean {mean} and std {std}"
        if self.size is None:
            return steps
        resize = self.resize or self.size
        how = {"center": "resized to cover", "squash": "resized to", "border": "fitted into"}
        return (
            f"{how[self.crop_mode]} {resize[0]}x{resize[1]} ({self.interpolation}), cropped to "
            f"{self.size[0]}x{self.size[1]} and {steps}"
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        """Convert uint8 (n, h, w, c) to float32 (n, c, h, w)."""
        images = pixels.permute(0, 3, 1, 2).contiguous().to(torch.float32) / 255
        mean, std = self.constants(images.shape[1])
        return (images - _per_channel(mean, images)) / _per_channel(std, images)

    def constants(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean and standard deviation for this number of channels.

        Raises:
            InputError: the number of values does not match, or a deviation is not positive.

        """
        default_mean, default_std = IMAGENET if channels == 3 else ((0.0,), (1.0,))
        mean, std = self.mean or default_mean, self.std or default_std
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise InputError(
                    f"--{name} has {plural(len(values), 'value')}, but the images have "
                    f"{plural(channels, 'channel')}; "
                    "give one value per channel, or one value for all"
                )
        if min(std) <= 0:
            raise InputError(f"--std must be positive, but a value is {min(std)}")
        return mean, std


def _per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files, decoded when they are read; several threads decode a batch.

    Attributes:
        paths: the files.
        targets: one class number per file, or None.
        classes: the names of the classes.
        scaling: the normalisation of pixels.
        mode: Pillow's colour mode, ``RGB`` or ``L``.

    """

    paths: tuple[Path, ...]
    targets: Tensor | None
    classes: tuple[str, ...]
    scaling: Scaling
    mode: str = "RGB"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Any:
        image = self.scaling(self._pixels(index)[None])[0]
        return image if self.targets is None else (image, self.targets[index])

    def gather(self, indices: Tensor) -> Any:
        """Return the collated samples of these indices."""
        with ThreadPoolExecutor(max_workers=4) as decoders:  # Pillow decodes outside the lock
            images = list(decoders.map(self._pixels, indices.tolist()))
        inputs = self.scaling(torch.stack(images))
        return inputs if self.targets is None else (inputs, self.targets[indices])

    def _pixels(self, index: int) -> Tensor:
        return read_image(self.paths[index], self.scaling, self.mode)


def check_one_size(files: ImageFiles) -> None:
    """Fail unless all image files have one size, or are brought to one; reads only their headers.

    Raises:
        InputError: names two files and their sizes.

    """
    if files.scaling.size is not None:
        return
    with ThreadPoolExecutor(max_workers=4) as readers:
        sizes = list(readers.map(_size, files.paths))
    for path, size in zip(files.paths, sizes, strict=True):
        if size != sizes[0]:
            shown = [f"{height}x{width}" for height, width in (sizes[0], size)]
            raise InputError(
                f"{files.paths[0]} is {shown[0]} and {path} is {shown[1]}, and the model does not "
                "say which size it takes; give --image-size to bring the images to one size"
            )


def _size(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        return image.height, image.width


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"the image {path} cannot be read ({error}); repair it or remove it from the folder"
        ) from error


def read_image(path: Path, scaling: Scaling, mode: str = "RGB") -> Tensor:
    """Return an image file as uint8 (h, w, c), resized and cropped.

    Raises:
        InputError: the file cannot be decoded; the message names it.

    """
    with _opened(path) as opened:
        image = scaling.fit(opened.convert(mode))
    array = np.array(image, dtype=np.uint8)
    return torch.from_numpy(array.reshape(image.height, image.width, -1))


def image_folder(folder: Path, scaling: Scaling, mode: str = "RGB") -> ImageFiles:
    """Find the images of a folder: one subfolder per class, or unlabelled images directly in it.

    Raises:
        InputError: there are none.

    """
    groups = sorted(item for item in folder.iterdir() if item.is_dir())
    by_class = {group.name: _images(group) for group in groups}
    if any(by_class.values()):
        paths = tuple(path for files in by_class.values() for path in files)
        numbers = torch.arange(len(by_class))
        counts = torch.tensor([len(files) for files in by_class.values()])
        targets = numbers.repeat_interleave(counts)
        return ImageFiles(paths, targets, tuple(by_class), scaling, mode)
    files = tuple(item for item in sorted(folder.iterdir()) if _is_image(item))
    if not files:
        kinds = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise InputError(
            f"the folder {folder} holds no images ({kinds}); put the images into one subfolder "
            "per class, below train/ and val/ if they are already split"
        )
    return ImageFiles(files, None, (), scaling, mode)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if _is_image(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def make_scaling(
    library: Preprocessing | None,
    *,
    size: Sequence[int] = (),
    crop: float | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Scaling:
    """Join what a library says of a model's images with what the user says instead.

    Args:
        library: what the library says; None if there is none.
        size: one number or height and width; nothing keeps the library's, or the files' own.
        crop: the share of the resized image that the crop keeps.
        interpolation: the filter.
        mean: per channel.
        std: per channel.

    Raises:
        InputError: the crop is no share, or the filter is unknown.

    """
    if crop is not None and not 0 < crop <= 1:
        raise InputError(f"--crop is {crop:g}; it must be above 0 and at most 1")
    wanted = (int(size[0]), int(size[-1])) if size else None
    if library is None:
        made = Scaling(wanted, tuple(mean) or None, tuple(std) or None)
    else:
        library = library.with_size(wanted) if wanted else library
        assumed = " (assumed, since no weights are named)" if library.assumed else ""
        made = Scaling(
            library.size, tuple(mean) or library.mean, tuple(std) or library.std, library.resize,
            library.crop_mode, library.interpolation, f"read from {library.source}{assumed}",
        )  # fmt: skip
    if crop is not None and made.size is not None:
        height, width = (math.floor(side / crop + ROUNDING) for side in made.size)
        made = replace(made, resize=(height, width))
    return made if interpolation is None else replace(made, interpolation=interpolation)
