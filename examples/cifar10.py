"""CIFAR-10: residual networks and images, for ``--arch`` and ``--data``.

    fxprune compile resnet56_cifar10.pt --arch examples.cifar10:resnet --arch-option depth=56 \
        --data examples.cifar10:data --data-option root=FOLDER --target macs=50% -o out/

The folder holds ``cifar10_train_10k.npz`` and ``cifar10_test.npz``, with uint8 ``x`` (n, 32, 32, 3)
and ``y``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.data.datasets import Arrays
from fxprune.data.images import Scaling
from fxprune.data.roles import Data
from fxprune.errors import InputError

IMAGENET_SCALING = Scaling(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class PaddedShortcut(nn.Module):
    """Every other pixel, with zero channels on either side: the shortcut without parameters."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        stride = 1 if inner == outer else 2
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        same = inner == outer
        self.shortcut = nn.Identity() if same else PaddedShortcut((outer - inner) // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """The residual network of He et al. 2016 for 32 x 32 images, of depth 6 n + 2."""

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        count, rest = divmod(depth - 2, 6)
        if rest or count < 1:
            raise InputError(f"depth must be 6 n + 2 (20, 32, 44, 56, 110), not {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(16, 16, count)
        self.layer2 = stage(16, 32, count)
        self.layer3 = stage(32, 64, count)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]  # a module's call is Any


def stage(inner: int, outer: int, count: int) -> nn.Sequential:
    """Make the blocks of one width; the first halves the image if the width changes."""
    return nn.Sequential(Block(inner, outer), *(Block(outer, outer) for _ in range(count - 1)))


def resnet(depth: int = 20, classes: int = 10) -> ResNet:
    """Make a network, with untrained weights."""
    return ResNet(int(depth), int(classes))


def data(root: str, limit: int | None = None) -> Data:
    """Return 10,000 training images to calibrate and train on, and the test images to evaluate.

    Args:
        root: the folder with the two files.
        limit: how many of each to take, drawn at random but always the same; None for all.

    """
    train = images(Path(root) / "cifar10_train_10k.npz", limit)
    return Data(train, train, images(Path(root) / "cifar10_test.npz", limit))


def images(path: Path, limit: int | None) -> Arrays:
    """Read one of the files."""
    if not path.exists():
        raise InputError(f"there is no {path}; pass the folder that holds it as root")
    with np.load(path, allow_pickle=False) as arrays:
        x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]).long()
    if limit is not None:
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: int(limit)]
        x, y = x[chosen], y[chosen]
    return Arrays(x, y, IMAGENET_SCALING)
