"""Small networks and samples that the tests of sensitivity share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from support import randomise_norms
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import trace
from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context

SIZE = 5  # samples


class Small(nn.Module):
    """Two convolutions with a residual sum, so that units span several tensors."""

    def __init__(self, activation: nn.Module, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.outer = nn.Conv2d(3, 4, 1)
        self.activation = activation
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.stem(x))
        x = x + self.outer(self.activation(self.norm(self.inner(x))))
        made: Tensor = self.head(self.activation(x).mean((2, 3)))
        return made


class Dense(nn.Module):
    """Logits for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(self.first(x).relu())
        return made


def build(kind: Callable[[], nn.Module]) -> Program:
    return _build(kind)


@functools.cache
def _build(kind: Hashable) -> Program:
    torch.manual_seed(0)
    activation = nn.LeakyReLU(0.3) if kind is nn.LeakyReLU else kind()  # type: ignore[operator]
    model = randomise_norms(Small(activation)).double()
    return trace(model, (torch.randn(2, 2, 5, 5, dtype=torch.float64),))


def samples(seed: int = 1, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SIZE, 2, 5, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(classes, (SIZE,), generator=generator)


def context(x: Tensor, y: Tensor | None, loss: Any = F.cross_entropy) -> Context:
    return Context(data=Data(Arrays(x, y)), loss=loss)
