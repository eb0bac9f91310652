"""Datasets: the protocol of a sample source, and sources that return whole batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


class Samples(Protocol):
    """A map-style dataset whose items are ``(input, target)``, or an input alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class Gathers(Protocol):
    """A dataset that can return a whole batch, faster than item by item."""

    def gather(self, indices: Tensor) -> Any:
        """Return the collated samples: ``(inputs, targets)``, or a tensor of inputs alone."""


@dataclass(frozen=True, eq=False)
class Arrays:
    """Samples in memory as stacked tensors; each batch is transformed when it is read.

    Attributes:
        inputs: the samples, stacked along dimension 0.
        targets: one per sample, or None.
        change: function that transforms a stack of inputs into model inputs.

    """

    inputs: Tensor
    targets: Tensor | None = None
    change: Callable[[Tensor], Tensor] = field(default=lambda inputs: inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int, /) -> Any:
        inputs = self.change(self.inputs[index : index + 1])[0]
        return inputs if self.targets is None else (inputs, self.targets[index])

    def gather(self, indices: Tensor) -> Any:
        """Return the collated samples of these indices."""
        inputs = self.change(self.inputs[indices])
        return inputs if self.targets is None else (inputs, self.targets[indices])


@dataclass(frozen=True, eq=False)
class Collated:
    """A dataset with its own collate function."""

    samples: Samples
    collate: Callable[[list[Any]], Any]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> Any:
        return self.samples[index]

    def gather(self, indices: Tensor) -> Any:
        """Return the collated samples of these indices."""
        return self.collate([self.samples[index] for index in indices.tolist()])


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """A dataset whose items are the inputs of a model that takes several, and no target."""

    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> Any:
        return tuple(self.samples[index]), None
