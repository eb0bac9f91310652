"""The steps of random networks: each takes two earlier images and makes a new one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Step:
    """One step of a network: what it does, to which earlier values, and how wide it makes them.

    Attributes:
        kind: a key of ``BLOCKS``.
        first: counts back from the newest value; wraps around.
        second: the other operand, for steps with two.
        width: channels of the result, for steps that choose.
    """

    kind: str
    first: int = 0
    second: int = 1
    width: int = 4


class Block(nn.Module):
    """One step: takes two earlier values, of ``first`` and ``second`` channels."""

    width: int

    def __init__(self, first: int, second: int, step: Step) -> None:
        super().__init__()
        self.kind = step.kind


class Convolution(Block):
    def __init__(self, first: int, second: int, step: Step) -> None:
        super().__init__(first, second, step)
        self.width = first if step.kind == "depthwise" else step.width
        side = 1 if step.kind == "mix" else 3
        groups = {"depthwise": first, "grouped": math.gcd(first, step.width)}.get(step.kind, 1)
        if step.kind == "transposed":
            groups = 2 if first % 2 == 0 and step.width == 8 else 1
            self.layer: nn.Module = nn.ConvTranspose2d(
                first, self.width, 3, padding=1, groups=groups
            )
        else:
            if step.kind == "grouped":  # by offset or whole, whichever is finer
                groups = math.gcd(groups, 2 + 2 * (step.second % 2))
            self.layer = nn.Conv2d(first, self.width, side, padding=side // 2, groups=groups)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class Pointwise(Block):
    def __init__(self, first: int, second: int, step: Step) -> None:
        super().__init__(first, second, step)
        self.width = first
        layers: dict[str, nn.Module] = {
            "norm": nn.BatchNorm2d(first),
            "relu": nn.ReLU(),
            "pool": nn.MaxPool2d(3, stride=1, padding=1),
            "softmax": nn.Softmax(dim=1),
        }
        self.layer = layers[step.kind]

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class Meeting(Block):
    """Two values meet: in a sum, a product, or side by side."""

    def __init__(self, first: int, second: int, step: Step) -> None:
        super().__init__(first, second, step)
        self.width = first + second if step.kind == "cat" else first
        fits = first == second or step.kind == "cat"
        self.adapt = nn.Identity() if fits else nn.Conv2d(second, first, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.adapt(y)
        if self.kind == "cat":
            return torch.cat([y, x], 1)
        return x + y if self.kind == "add" else x * y


class Residual(Block):
    """Two different convolutions of two values meet in a sum."""

    def __init__(self, first: int, second: int, step: Step) -> None:
        super().__init__(first, second, step)
        self.width = step.width
        self.left = nn.Conv2d(first, step.width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(step.width)
        self.right = nn.Conv2d(second, step.width, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.norm(self.left(x)) + self.right(y))


class Shared(Block):
    """One layer is called on two values, which then go different ways."""

    def __init__(self, first: int, second: int, step: Step) -> None:
        super().__init__(first, second, step)
        self.width = 2 * step.width
        self.left = nn.Conv2d(first, step.width, 1)
        self.right = nn.Conv2d(second, step.width, 1)
        self.layer = nn.Conv2d(step.width, step.width, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.layer(self.left(x)), F.relu(self.layer(self.right(y)))], 1)


class Gate(Block):
    """Squeeze and excitation: channels scale themselves by their means."""

    def __init__(self, first: int, second: int, step: Step) -> None:
        super().__init__(first, second, step)
        self.width = first
        self.squeeze, self.excite = nn.Linear(first, step.width), nn.Linear(step.width, first)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return x * scale[:, :, None, None]


class Split(Block):
    """Halves go different ways and come back in the other order."""

    def __init__(self, first: int, second: int, step: Step) -> None:
        super().__init__(first, second, step)
        self.small = first // 2
        self.width = (first - self.small) + step.width
        self.layer = nn.Conv2d(self.small, step.width, 3, padding=1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        if self.small * 2 == x.shape[1]:
            left, right = x.chunk(2, 1)
        else:
            left, right = x.split([self.small, x.shape[1] - self.small], 1)
        return torch.cat([F.relu(right), self.layer(left)], 1)


class Shuffle(Block):
    """The channel shuffle of ShuffleNet, in two groups where the width is even."""

    def __init__(self, first: int, second: int, step: Step) -> None:
        super().__init__(first, second, step)
        self.width = first
        self.groups = 2 if first % 2 == 0 else 1

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        batch, width, height, breadth = x.shape
        grouped = x.view(batch, self.groups, width // self.groups, height, breadth)
        return grouped.transpose(1, 2).reshape(batch, width, height, breadth)


class Padded(Block):
    """A shortcut padded with zero channels meets a wider convolution (CIFAR ResNets)."""

    def __init__(self, first: int, second: int, step: Step) -> None:
        super().__init__(first, second, step)
        self.width = first + 4
        self.layer = nn.Conv2d(first, self.width, 3, padding=1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return F.relu(self.layer(x) + F.pad(x, (0, 0, 0, 0, 2, 2)))


class Slice(Block):
    """The first channel is dropped, or every second one where the step is wide."""

    def __init__(self, first: int, second: int, step: Step) -> None:
        super().__init__(first, second, step)
        self.stride = 2 if step.width == 12 else 1
        self.start = min(1, first - 1)  # something is always left
        self.width = len(range(self.start, first, self.stride))

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return x[:, self.start :: self.stride]


class Attention(Block):
    """Attention over the pixels with two heads, added to what it read."""

    def __init__(self, first: int, second: int, step: Step) -> None:
        super().__init__(first, second, step)
        self.width = first
        self.q = nn.Linear(first, step.width)
        self.k = nn.Linear(first, step.width)
        self.v = nn.Linear(first, step.width)
        self.out = nn.Linear(step.width, first)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # batch, pixels, channels
        q, k, v = (
            layer(tokens).unflatten(2, (2, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(mixed).transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]


class ChannelNorm(Block):
    """Layer normalisation over the channels, as in ConvNeXt."""

    def __init__(self, first: int, second: int, step: Step) -> None:
        super().__init__(first, second, step)
        self.width = first
        self.layer = nn.LayerNorm(first)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


BLOCKS: dict[str, type[Block]] = {
    **dict.fromkeys(("conv", "mix", "depthwise", "grouped", "transposed"), Convolution),
    **dict.fromkeys(("norm", "relu", "pool", "softmax"), Pointwise),
    **dict.fromkeys(("add", "multiply", "cat"), Meeting),
    "residual": Residual,
    "shared": Shared,
    "gate": Gate,
    "split": Split,
    "shuffle": Shuffle,
    "pad": Padded,
    "slice": Slice,
    "attention": Attention,
    "layer_norm": ChannelNorm,
}
