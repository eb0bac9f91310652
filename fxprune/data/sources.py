"""Load the data that ``--data`` names, and check that it fits the model."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.data.batches import batches
from fxprune.data.datasets import Arrays
from fxprune.data.images import ImageFiles, Scaling, check_one_size, image_folder
from fxprune.data.roles import Data, as_data
from fxprune.errors import InputError
from fxprune.models.factories import call_factory, find_factory

# Usual names of the folders of a data set.
TRAIN, EVAL = ("train", "training"), ("val", "valid", "validation", "test", "eval")
CHECKED_LABELS = 512  # samples of a slow dataset whose labels are checked before the run


def load_data(
    spec: str,
    scaling: Scaling | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    channels: int = 3,
    seed: int = 0,
) -> Data:
    """Load the data that ``--data`` names.

    Args:
        spec: an image folder, an ``.npz`` file with an array ``x`` and optionally ``y``, the
            built-in ``digits``, or ``package.module:factory``.
        scaling: normalisation of 8-bit images.
        options: keyword arguments for a factory.
        channels: channels of image files: 1 for grey, 3 for colour.
        seed: seed for drawing the held-out samples if no evaluation data is given.

    Raises:
        InputError: there is no such data, or it cannot be read.

    """
    scaling = scaling or Scaling()
    path = Path(spec)
    if spec == "digits":
        return digits()
    if path.is_dir():
        return _from_folder(path, scaling, "L" if channels == 1 else "RGB", seed)
    if path.suffix == ".npz":
        return _from_npz(path, scaling, seed)
    if ":" in spec:
        factory = find_factory(spec, "--data")
        return as_data(call_factory(factory, spec, "--data", dict(options or {})), seed=seed)
    raise InputError(
        f"--data {spec}: there is no such folder; give an image folder, an .npz file with arrays "
        "x and y, the built-in data set digits, or package.module:factory"
    )


def digits() -> Data:
    """Return scikit-learn's 1,797 digits, 1 x 8 x 8; the same 360 are always for evaluation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "--data digits needs scikit-learn; install it with: pip install 'fxprune[examples]'"
        ) from error
    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # n, 1, 8, 8
    y = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:360], order[360:]
    train = Arrays(x[rest], y[rest])
    return Data(train, train, Arrays(x[held_out], y[held_out]))


def _from_folder(folder: Path, scaling: Scaling, mode: str, seed: int) -> Data:
    subfolders = {item.name.lower(): item for item in folder.iterdir() if item.is_dir()}
    train = next((subfolders[name] for name in TRAIN if name in subfolders), None)
    evaluation = next((subfolders[name] for name in EVAL if name in subfolders), None)
    if train is None:
        files = image_folder(folder, scaling, mode)
        check_one_size(files)
        return _noted(as_data(files, seed=seed), scaling, mode)
    parts = {"train": image_folder(train, scaling, mode)}
    if evaluation is not None:
        parts["eval"] = image_folder(evaluation, scaling, mode)
        _check_classes(*parts.values())
    for files in parts.values():
        check_one_size(files)
    return _noted(as_data(parts, seed=seed), scaling, mode)


def _check_classes(train: Any, evaluation: Any) -> None:
    if train.classes != evaluation.classes:
        odd = sorted(set(train.classes) ^ set(evaluation.classes))
        raise InputError(
            f"the training and evaluation folders have different classes: {', '.join(odd[:5])}; "
            "class numbers follow the order of the class folders, so both need the same ones"
        )


def _noted(data: Data, scaling: Scaling, mode: str, *, files: bool = True) -> Data:
    """Note what is done to images, unless the user said all of it."""
    said = scaling.mean and scaling.std and (scaling.size or not files) and not scaling.source
    if said or (mode != "RGB" and not scaling.source):
        return data
    shown = scaling if files else replace(scaling, size=None)
    whose = scaling.source or "the mean and std of ImageNet"
    size = "--image-size, --crop, --interpolation, " if files else ""
    note = (
        f"images are {shown.describe(len(mode))}: what no option sets is {whose}; change it by "
        f"{size}--mean and --std"
    )
    return replace(data, notes=(*data.notes, note))


def _from_npz(path: Path, scaling: Scaling, seed: int) -> Data:
    if not path.exists():
        raise InputError(f"--data {path}: there is no such file")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if "x" not in arrays:
                raise InputError(
                    f"--data {path} holds {', '.join(arrays) or 'nothing'}; it needs an array x "
                    "(first dimension: samples) and, for labels, an array y"
                )
            x = arrays["x"]
            y = arrays.get("y")
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"--data {path} cannot be read ({error}); save arrays of numbers with numpy.savez"
        ) from error
    if y is not None and len(x) != len(y):
        raise InputError(f"--data {path} holds {len(x)} samples in x and {len(y)} in y")
    is_image = x.dtype == np.uint8
    if is_image and x.ndim not in (3, 4):
        raise InputError(
            f"--data {path}: x is uint8 of shape {x.shape}, but images must have the shape (n, "
            "height, width, channels) or (n, height, width)"
        )
    if is_image and x.ndim == 3:
        x = x[..., None]
    data = as_data(_arrays(x, y, scaling if is_image else _unchanged), seed=seed)
    return _noted(data, scaling, "RGB", files=False) if is_image and x.shape[-1] == 3 else data


def _unchanged(inputs: Tensor) -> Tensor:
    return inputs


def _arrays(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any] | None, change: Callable[[Tensor], Tensor]
) -> Arrays:
    """Make samples from arrays; floats become float32, integer targets become int64."""
    inputs = torch.from_numpy(x)
    if inputs.is_floating_point():
        inputs = inputs.to(torch.float32)
    if y is None:
        return Arrays(inputs, None, change)
    targets = torch.from_numpy(y)
    return Arrays(inputs, targets.to(_precision(targets)), change)


def _precision(targets: Tensor) -> torch.dtype:
    return torch.float32 if targets.is_floating_point() else torch.int64


def check_inputs(data: Data, example_inputs: tuple[Any, ...]) -> None:
    """Check that samples have the shapes of the model's inputs, except for the batch dimension.

    Raises:
        InputError: the shapes differ; the message states both.

    """
    wanted = [tuple(leaf.shape[1:]) for leaf in _tensors(example_inputs)]
    for role, samples in data.roles():
        batch = next(batches(samples, 1))
        given = [tuple(leaf.shape[1:]) for leaf in _tensors(batch.inputs)]
        if given != wanted:
            raise InputError(
                f"the {role} samples are {_shapes(given)}, but the model takes {_shapes(wanted)}; "
                "resize image files with --image-size, or give data of the model's input size"
            )


def _tensors(inputs: tuple[Any, ...]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    return " and ".join("x".join(map(str, shape)) or "scalars" for shape in shapes)


def check_labels(data: Data, outputs: int) -> None:
    """Check that integer labels, one per sample, lie within the model's outputs.

    All labels in memory are checked; of slower datasets, those of 512 samples.

    Raises:
        InputError: a label is out of range; the message states the label and the range.

    """
    for role, samples in data.roles():
        labels = _labels(samples)
        if labels is None or labels.ndim != 1 or labels.is_floating_point() or not len(labels):
            continue
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= outputs:
            wrong = low if low < 0 else high
            raise InputError(
                f"the {role} data has the label {wrong}, but the model's {outputs} outputs allow "
                f"labels 0 to {outputs - 1}; data and model must have the same classes"
            )


def _labels(samples: Any) -> Tensor | None:
    indices = getattr(samples, "indices", None)
    if indices is not None and isinstance(samples.dataset, (Arrays, ImageFiles)):
        targets = samples.dataset.targets
        return None if targets is None else targets[torch.as_tensor(indices)]
    if isinstance(samples, (Arrays, ImageFiles)):
        return samples.targets
    first = [batch.target for batch in batches(samples, 64, seed=0, limit=CHECKED_LABELS)]
    known = [target for target in first if isinstance(target, Tensor)]
    return torch.cat(known) if known else None
