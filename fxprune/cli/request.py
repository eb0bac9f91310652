"""The model and the data as the command line names them, and how to load them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.data.images import make_scaling
from fxprune.data.roles import Data
from fxprune.data.sources import load_data
from fxprune.errors import InputError
from fxprune.graph.program import Program
from fxprune.models.loading import load_model
from fxprune.models.preprocessing import preprocessing_of
from fxprune.pipeline.values import convert
from fxprune.run.options import Options


@dataclass(frozen=True)
class Request:
    """A model and data as users name them; the fields are options of the command line.

    Attributes:
        model: path of the model's file.
        arch: architecture of a state dict.
        arch_option: ``name=value`` for the architecture's factory.
        data: folder, file, name or factory of the data.
        data_option: ``name=value`` for the data's factory.
        input_shape: shape of one sample, such as ``3,32,32``.
        image_size: size to resize and crop image files to, ``224`` or ``224,160`` (height, width).
        crop: fraction of a resized image, from 0 to 1, that the crop to the image size keeps.
        interpolation: filter to resize image files with.
        mean: per-channel mean, for pixels scaled to [0, 1].
        std: per-channel standard deviation, for pixels scaled to [0, 1].
        trust_pickle: whether unpickling is allowed, which can execute code stored in the file.

    """

    model: str
    arch: str | None = None
    arch_option: tuple[str, ...] = ()
    data: str | None = None
    data_option: tuple[str, ...] = ()
    input_shape: str | None = None
    image_size: str | None = None
    crop: float | None = None
    interpolation: str | None = None
    mean: str | None = None
    std: str | None = None
    trust_pickle: bool = False

    def recipe_fields(self) -> dict[str, Any]:
        """Return what a recipe records: all that is given, but never the consent."""
        given = {name: value for name, value in asdict(self).items() if value not in (None, ())}
        del given["trust_pickle"]
        return given

    def load_model(self) -> nn.Module | Program:
        """Load the model's file."""
        options = self._arch_options()
        return load_model(self.model, self.arch, options=options, trust_pickle=self.trust_pickle)

    def load_data(self, seed: int, model: nn.Module | Program | None = None) -> Data | None:
        """Load the data, if any are named; a program tells the image size that it takes."""
        if self.data is None:
            return None
        shape = self._shape() or _image_shape(model)
        shape = shape if len(shape) == 3 else ()
        scaling = make_scaling(
            preprocessing_of(self.arch, self._arch_options(), Path(self.model).name),
            size=numbers(self.image_size, "--image-size", int) or shape[1:],
            crop=self.crop,
            interpolation=self.interpolation,
            mean=numbers(self.mean, "--mean", float),
            std=numbers(self.std, "--std", float),
        )
        options = keywords(self.data_option, "--data-option")
        channels = shape[0] if shape else self._arch_options().get("in_chans", 3)
        return load_data(self.data, scaling, options=options, channels=channels, seed=seed)

    def _arch_options(self) -> Mapping[str, Any]:
        return keywords(self.arch_option, "--arch-option")

    def example_inputs(self) -> tuple[Any, ...] | None:
        """Return one random sample of the input shape, if that is given."""
        if not (shape := self._shape()):
            return None
        random = torch.Generator().manual_seed(0)
        return (torch.randn(1, *shape, generator=random),)

    def _shape(self) -> tuple[int, ...]:
        return numbers(self.input_shape, "--input-shape", int)


def _image_shape(model: nn.Module | Program | None) -> tuple[int, ...]:
    """The channels, height and width of a program's only input, if it takes images."""
    leaves = pytree.tree_leaves(model.example_inputs) if isinstance(model, Program) else []
    if len(leaves) == 1 and isinstance(leaves[0], Tensor) and leaves[0].dim() == 4:
        return tuple(leaves[0].shape[1:])
    return ()


# What a recipe's [run] may set; consent to unpickling is given on the command line alone.
_HINTS = get_type_hints(Request) | get_type_hints(Options) | {"target": tuple[str, ...]}
_RECIPE_FIELDS = {field.name for field in fields(Request)} | set(Options.RECIPE_FIELDS) | {"target"}


def typed(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert the options of a recipe to their types.

    Raises:
        InputError: an option is unknown or has a wrong value.

    """
    found: dict[str, Any] = {}
    for option, value in options.items():
        name = option.replace("-", "_")
        if name not in _RECIPE_FIELDS - {"trust_pickle"}:
            raise InputError(f"{where}: [run] cannot set '{option}'")
        try:
            found[name] = convert(value, _HINTS[name])
        except ValueError as error:
            raise InputError(f"{where}: '{option}': {error}") from error
    return found


def split(told: Mapping[str, Any]) -> tuple[Request, dict[str, Any]]:
    """Split the options into those of the model and the data, and those of the run.

    Raises:
        InputError: no model is named.

    """
    if "model" not in told:
        raise InputError("no model is given; write fxprune compile MODEL --data DATA")
    parts = {field.name for field in fields(Request)}
    named = {name: value for name, value in told.items() if name in parts}
    for name in ("arch_option", "data_option"):
        named[name] = tuple(named.get(name, ()))
    return Request(**named), {name: value for name, value in told.items() if name not in parts}


def keywords(texts: Iterable[str], option: str) -> Mapping[str, Any]:
    """Read ``name=value`` texts; a value that is valid JSON is read as JSON, any other as text."""
    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise InputError(f"{option} {text}: write name=value")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return found


def numbers(text: str | None, option: str, kind: type[Any]) -> tuple[Any, ...]:
    """Read positive numbers separated by commas or ``x``; none for None."""
    if text is None:
        return ()
    try:
        found = tuple(kind(part) for part in re.split(r"[,x]", str(text)))
    except ValueError as error:
        raise InputError(
            f"{option} {text}: write numbers separated by commas, e.g. 3,32,32"
        ) from error
    if kind is int and min(found) < 1:
        raise InputError(f"{option} {text}: every size must be at least 1")
    return found


def read_text(path: Path, option: str) -> str:
    """Read a text file that an option names."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read {option} {path}: {reason}") from error
