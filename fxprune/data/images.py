"""Images: folders of image files, and the normalisation of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fxprune.errors import InputError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"})
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Scaling:
    """Normalisation of 8-bit pixels: ``(pixel / 255 - mean) / std``, in FP32.

    Attributes:
        size: height and width to resize and crop image files to; None keeps their own size.
        mean: one value per channel, or one for all. None is ImageNet's mean for three channels,
            else 0.
        std: one value per channel, or one for all. None is ImageNet's standard deviation for
            three channels, else 1.

    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

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
                    f"--{name} has {len(values)} values, but the images have {channels} channels; "
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
        _check_equal([self.paths[index] for index in indices.tolist()], images)
        inputs = self.scaling(torch.stack(images))
        return inputs if self.targets is None else (inputs, self.targets[indices])

    def _pixels(self, index: int) -> Tensor:
        return read_image(self.paths[index], self.scaling.size, self.mode)


def _check_equal(paths: Sequence[Path], images: Sequence[Tensor]) -> None:
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            sizes = [f"{i.shape[0]}x{i.shape[1]}" for i in (images[0], image)]
            raise InputError(
                f"{paths[0]} is {sizes[0]} and {path} is {sizes[1]}; give --image-size to resize "
                "all images to one size"
            )


def read_image(path: Path, size: tuple[int, int] | None, mode: str = "RGB") -> Tensor:
    """Return an image file as uint8 (h, w, c), resized to cover ``size`` and centre-cropped.

    Raises:
        InputError: the file cannot be decoded; the message names it.

    """
    try:
        with Image.open(path) as opened:
            image = opened.convert(mode)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"the image {path} cannot be read ({error}); repair it or remove it from the folder"
        ) from error
    if size is not None and (image.height, image.width) != size:
        image = _cover(image, *size)
    array = np.array(image, dtype=np.uint8)
    return torch.from_numpy(array.reshape(image.height, image.width, -1))


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = max(height / image.height, width / image.width)
    large = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    image = image.resize(large, Image.Resampling.BILINEAR)
    left, top = (large[0] - width) // 2, (large[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


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
