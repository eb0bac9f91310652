"""Batches of samples: the inputs of a model, and the targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Subset, TensorDataset, default_collate

from fxprune.data.datasets import Gathers, Samples, Unlabelled


@dataclass(frozen=True)
class Batch:
    """Stacked samples: the inputs of the model, and the targets (None without labels)."""

    inputs: tuple[Any, ...]
    target: Any | None

    def __len__(self) -> int:
        return int(pytree.tree_leaves(self.inputs)[0].shape[0])


def batches(
    dataset: Samples,
    batch_size: int,
    *,
    seed: int | None = None,
    limit: int | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[Batch]:
    """Yield batches of the dataset; the last one may be smaller.

    Args:
        dataset: items are ``(input, target)``, or an input alone; an input that is a tuple holds
            several model inputs.
        batch_size: samples per batch.
        seed: shuffles the samples, in the same order for the same seed; None keeps the order of
            the dataset.
        limit: largest number of samples; without a seed these are the first ones, which may all
            belong to one class.
        device: device of the tensors.

    """
    indices = torch.arange(len(dataset))
    if seed is not None:
        indices = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    for chosen in indices[:limit].split(batch_size):
        collated = pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(device).contiguous(), _gather(dataset, chosen)
        )
        yield _as_batch(collated)


def _gather(dataset: Any, indices: Tensor) -> Any:
    if isinstance(dataset, Subset):
        return _gather(dataset.dataset, torch.as_tensor(dataset.indices)[indices])
    if isinstance(dataset, Unlabelled):
        return tuple(_gather(dataset.samples, indices)), None
    if isinstance(dataset, Gathers):
        return dataset.gather(indices)
    if isinstance(dataset, TensorDataset):
        return tuple(tensor[indices] for tensor in dataset.tensors)
    return _collated([dataset[index] for index in indices.tolist()])


def _collated(samples: list[Any]) -> Any:
    """Stack samples; a target that is None in all of them stays None."""
    if all(isinstance(one, (tuple, list)) and one and one[-1] is None for one in samples):
        return [*default_collate([tuple(one[:-1]) for one in samples]), None]
    return default_collate(samples)


def _as_batch(collated: Any) -> Batch:
    if not isinstance(collated, (tuple, list)):
        return Batch((collated,), None)
    *inputs, target = collated if len(collated) > 1 else (*collated, None)
    if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)):
        inputs = list(inputs[0])
    return Batch(tuple(inputs), target)
