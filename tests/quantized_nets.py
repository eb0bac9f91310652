"""Networks and data for tests of quantisation."""

from __future__ import annotations

import torch
from support import randomise_norms, trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.graph.program import Program
from fxprune.passes import ConvertQuantized, FoldBatchNorm, InsertObservers, TrainQuantized
from fxprune.pipeline.context import Context


class Shortcuts(nn.Module):
    """A stem, a padded and strided shortcut, a concatenation, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.hidden, self.head = nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.stem(x)))
        x = F.relu(self.down(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        x = F.max_pool2d(x, 2)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.head(F.relu(self.hidden(x)))  # type: ignore[no-any-return]


def shortcuts() -> tuple[Program, Context]:
    """The network, its norms folded, and labels that it can learn."""
    torch.manual_seed(0)
    model = randomise_norms(Shortcuts())
    x = torch.randn(96, 3, 8, 8)
    program = trace(model, x[:2])
    with torch.no_grad():
        labels = program(x).argmax(1)
    samples = Arrays(x, labels)
    context = Context(Data(samples, samples, samples), dense=program.copy())
    FoldBatchNorm()(program, context)
    return program, context


def observed(**options: object) -> tuple[Program, Context]:
    """The network with observers."""
    program, context = shortcuts()
    InsertObservers(**{"measure": False} | options)(program, context)  # type: ignore[arg-type]
    return program, context


def calibrated(**options: object) -> tuple[Program, Context]:
    """The network with fake-quantisers."""
    program, context = observed(reduce_range=True)
    TrainQuantized(**options)(program, context)  # type: ignore[arg-type]
    return program, context


def converted() -> tuple[Program, Context]:
    """The network on codes."""
    program, context = calibrated()
    ConvertQuantized()(program, context)
    return program, context


class Attention(nn.Module):
    """Two heads of attention between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def attention(**options: object) -> tuple[Program, Context]:
    """Attention on codes."""
    torch.manual_seed(0)
    x = 2 * torch.randn(64, 6, 8)
    program = trace(Attention(), x[:2])
    context = Context(Data(Arrays(x)), dense=program.copy())
    InsertObservers(**{"measure": False} | options)(program, context)  # type: ignore[arg-type]
    TrainQuantized(samples=64)(program, context)
    ConvertQuantized()(program, context)
    return program, context
