"""Random small networks with the wiring that hurts: what merges, splits, reorders and mixes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from blocks import BLOCKS, Step
from hypothesis import strategies as st
from support import randomise_norms
from torch import Tensor, nn

SIDE = 4  # height and width of every image in these networks
KINDS = (
    "conv", "mix", "depthwise", "grouped", "transposed", "norm", "relu", "pool",
    "add", "residual", "residual", "shared", "multiply", "gate", "cat", "split", "shuffle",
    "pad", "slice", "attention", "softmax", "layer_norm",
)  # fmt: skip
HEADS = ("pooled", "flattened", "flattened", "image")


@dataclass(frozen=True)
class Design:
    """All of a random network: its steps, its head, and the seed of its weights."""

    steps: tuple[Step, ...]
    head: str = "pooled"
    seed: int = 0


@st.composite
def designs(draw: st.DrawFn, max_steps: int = 7) -> Design:
    """Draw designs of networks; ``Network(design)`` builds one."""
    step = st.builds(
        Step,
        st.sampled_from(KINDS),
        st.integers(0, 2),
        st.integers(0, 3),
        st.sampled_from((4, 8, 12)),
    )
    steps = draw(st.lists(step, min_size=2, max_size=max_steps))
    return Design(tuple(steps), draw(st.sampled_from(HEADS)), draw(st.integers(0, 3)))


class Network(nn.Module):
    """The network of a design, in float64, with random batch-norm statistics, in eval mode."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.design = design
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(design.seed)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.blocks = nn.ModuleList()
            widths = [3, 8]
            for step in design.steps:
                block = BLOCKS[step.kind](
                    _pick(widths, step.first), _pick(widths, step.second), step
                )
                self.blocks.append(block)
                widths.append(block.width)
            self.head = _head(design.head, widths[-1])
        randomise_norms(self, design.seed)
        self.double().eval()

    def forward(self, x: Tensor) -> Any:
        values = [x, self.stem(x)]
        for step, block in zip(self.design.steps, self.blocks, strict=True):
            values.append(block(_pick(values, step.first), _pick(values, step.second)))
        return self.head(values[-1])

    def example(self, batch: int = 2) -> Tensor:
        """Return inputs that run the network."""
        generator = torch.Generator().manual_seed(self.design.seed + 1)
        return torch.randn(batch, 3, SIDE, SIDE, dtype=torch.float64, generator=generator)


def _pick(values: list[Any], back: int) -> Any:
    return values[-1 - back % len(values)]


def _head(kind: str, width: int) -> nn.Module:
    if kind == "pooled":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    if kind == "flattened":
        return nn.Sequential(nn.Flatten(), nn.Linear(width * SIDE * SIDE, 5))
    return nn.Sequential(nn.Conv2d(width, 2, 1), nn.Sigmoid())
