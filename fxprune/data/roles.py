"""Roles of data: calibration, training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from fxprune.data.datasets import Arrays, Collated, Samples, Unlabelled
from fxprune.errors import InputError

ROLES = ("calibration", "train", "eval")
HELD_OUT = 0.2  # fraction of the samples held out for evaluation if no evaluation data is given


@dataclass(frozen=True, eq=False)
class Data:
    """Datasets by role; items are ``(input, target)``, or an input alone.

    Attributes:
        calibration: samples for statistics and sensitivities.
        train: samples for fine-tuning; None disables fine-tuning.
        eval: samples for measuring accuracy; None disables evaluation.
        notes: remarks on the choice of samples, for the report.

    """

    calibration: Samples
    train: Samples | None = None
    eval: Samples | None = None
    notes: tuple[str, ...] = ()

    def roles(self) -> Iterator[tuple[str, Samples]]:
        """Yield each role that has a dataset, with the dataset."""
        for role in ROLES:
            if (samples := getattr(self, role)) is not None:
                yield role, samples


def as_data(source: Any, *, seed: int = 0) -> Data:
    """Assign datasets to roles.

    Args:
        source: a ``Data``, a map-style dataset, a ``DataLoader`` (its dataset and its collate
            function are used), a tensor of inputs, a pair of tensors ``(x, y)``, or a mapping from
            any of ``calibration``, ``train`` and ``eval`` to these. Without ``eval``, a fifth of
            the samples is held out for it; ``{"eval": None}`` disables evaluation.
        seed: seed for drawing the held-out samples.

    Raises:
        InputError: the source is none of these, or a dataset is empty.

    """
    if isinstance(source, Data):
        return source
    if not isinstance(source, Mapping):
        return _with_roles({"train": _samples(source, "data")}, seed)
    if unknown := sorted(map(str, set(source) - set(ROLES))):
        raise InputError(
            f"the data has the unknown keys {', '.join(unknown)}; a mapping may have the keys "
            f"{', '.join(ROLES)}"
        )
    parts = {role: None if part is None else _samples(part, role) for role, part in source.items()}
    return _with_roles(parts, seed)


def _with_roles(parts: Mapping[str, Samples | None], seed: int) -> Data:
    train, calibration = parts.get("train"), parts.get("calibration")
    pool = train if train is not None else calibration
    if pool is None:
        raise InputError(
            "the data has no samples for calibration; add 'calibration' or 'train' samples to "
            "'eval'"
        )
    notes: list[str] = []
    evaluation = parts.get("eval")
    rest = pool
    if "eval" not in parts and len(pool) > 1:
        evaluation, rest = hold_out(pool, seed)
        notes.append(
            f"no evaluation data was given: {len(evaluation):,} of {len(pool):,} samples "
            f"are held out for evaluation (drawn with seed {seed})"
        )
    if train is None:
        if "train" not in parts:
            notes.append("no training data was given: training uses the calibration samples")
        return Data(rest, rest if "train" not in parts else None, evaluation, tuple(notes))
    if calibration is None or calibration is train:
        calibration = rest
    return Data(calibration, rest, evaluation, tuple(notes))


def hold_out(samples: Samples, seed: int, share: float = HELD_OUT) -> tuple[Samples, Samples]:
    """Split a dataset at random into ``(held out, rest)``; the same seed gives the same split."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(round(share * len(samples)), 1), len(samples) - 1)
    held_out, rest = sorted(order[:count]), sorted(order[count:])
    return _subset(samples, held_out), _subset(samples, rest)


def _subset(samples: Samples, indices: list[int]) -> Samples:
    subset: Samples = Subset(samples, indices)  # type: ignore[arg-type]  # any map-style dataset
    return subset


def _samples(source: Any, role: str) -> Samples:
    if isinstance(source, DataLoader):
        source = _unload(source)
    if isinstance(source, (Tensor, np.ndarray)):
        source = Arrays(torch.as_tensor(source))
    elif isinstance(source, tuple) and all(isinstance(x, (Tensor, np.ndarray)) for x in source):
        source = _pair(source, role)
    if isinstance(source, IterableDataset) or not (
        hasattr(source, "__len__") and hasattr(source, "__getitem__")
    ):
        raise InputError(
            f"{role} is a {type(source).__name__}, which has no length or no items by index; "
            "give a map-style dataset of (input, target) samples, a DataLoader over one, "
            "or a pair of tensors"
        )
    if len(source) == 0:
        raise InputError(f"{role} has no samples")
    samples: Samples = source
    return samples


def _unload(loader: DataLoader[Any]) -> Any:
    if loader.collate_fn is None or loader.collate_fn is default_collate:
        return loader.dataset
    return Collated(loader.dataset, loader.collate_fn)  # type: ignore[arg-type]  # map-style, checked next


def _pair(source: tuple[Any, ...], role: str) -> Samples:
    tensors = [torch.as_tensor(array) for array in source]
    if len(tensors) < 2 or len({len(tensor) for tensor in tensors}) > 1:
        lengths = ", ".join(str(len(tensor)) for tensor in tensors)
        raise InputError(
            f"{role} is a tuple of tensors of lengths {lengths}; "
            "give one pair (x, y) with one target per input"
        )
    if len(tensors) > 2:
        several: Samples = TensorDataset(*tensors)
        return several
    return Arrays(tensors[0], tensors[1])


def without_labels(data: Data, inputs: int | None) -> Data:
    """Take samples of as many elements as the model has inputs for unlabelled ones.

    Args:
        data: its samples are ``(input, target)`` unless they are found to be inputs alone.
        inputs: how many inputs the model needs; None if that is not known.

    """
    if inputs is None or inputs < 2:
        return data
    made: dict[int, Samples] = {}
    for _, samples in data.roles():
        item = samples[0]
        if isinstance(item, (tuple, list)) and len(item) == inputs and item[-1] is not None:
            made[id(samples)] = Unlabelled(samples)
    if not made:
        return data
    changed = {role: made.get(id(samples), samples) for role, samples in data.roles()}
    note = f"samples of {inputs} elements are the model's {inputs} inputs, without labels"
    return replace(data, **changed, notes=(*data.notes, note))


def subset(samples: Samples, count: int, seed: int) -> Samples:
    """Choose ``count`` samples at random; the same seed gives the same samples."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return _subset(samples, sorted(order[:count].tolist()))
