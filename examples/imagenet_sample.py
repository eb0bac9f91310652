"""A thousand ImageNet images, one per class, for networks that take 224 x 224.

    fxprune compile mobilenet_v2.pt --arch torchvision:mobilenet_v2 \
        --data examples.imagenet_sample:data --data-option root=FOLDER --target macs=50% -o out/

The folder holds ``imagenet_sample1000_224.npz``: ``jpeg`` (the bytes of all files, concatenated),
``offsets`` (1,001 of them) and ``labels``. Half of the images are for calibration, the other half
for evaluation.
"""

from __future__ import annotations

import io
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fxprune.data.images import Scaling
from fxprune.data.roles import Data
from fxprune.errors import InputError

HALF_SCALING = Scaling(mean=(0.5,), std=(0.5,))


@dataclass(frozen=True, eq=False)
class Jpegs:
    """Compressed images in memory, decoded when they are asked for."""

    files: tuple[bytes, ...]
    labels: Tensor
    scaling: Scaling

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> Any:
        return self.scaling(decoded(self.files[index])[None])[0], self.labels[index]

    def gather(self, indices: Tensor) -> Any:
        """Return the collated samples of these indices."""
        files = [self.files[index] for index in indices.tolist()]
        with ThreadPoolExecutor(max_workers=4) as decoders:
            pixels = torch.stack(list(decoders.map(decoded, files)))
        return self.scaling(pixels), self.labels[indices]


def decoded(file: bytes) -> Tensor:
    """Return a JPEG file's pixels, uint8 (h, w, 3)."""
    with Image.open(io.BytesIO(file)) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))


def data(root: str, seed: int = 0, limit: int | None = None) -> Data:
    """Return half of the images to calibrate and train on, and the other half to evaluate.

    Args:
        root: the folder with the file.
        seed: draws the halves.
        limit: how many images to take of either half; None for all.

    """
    path = Path(root) / "imagenet_sample1000_224.npz"
    if not path.exists():
        raise InputError(f"there is no {path}; pass the folder that holds it as root")
    with np.load(path, allow_pickle=False) as arrays:
        content, offsets = arrays["jpeg"].tobytes(), arrays["offsets"].tolist()
        labels = torch.from_numpy(arrays["labels"]).long()
    files = [content[start:end] for start, end in itertools.pairwise(offsets)]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(int(seed)))
    halves = [half[: None if limit is None else int(limit)] for half in order.tensor_split(2)]
    first, second = (
        Jpegs(tuple(files[index] for index in half.tolist()), labels[half], HALF_SCALING)
        for half in halves
    )
    return Data(first, first, second)
