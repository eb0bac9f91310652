"""Load models from files: state dicts, exported programs, and pickled modules if allowed."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import nn
from torch.export import ExportedProgram

from fxprune.errors import InputError
from fxprune.graph import serialize
from fxprune.graph.archive_check import check_exported
from fxprune.graph.notebook import plural
from fxprune.graph.program import Program
from fxprune.graph.trace import from_exported
from fxprune.models.compat import enable_torchvision
from fxprune.models.factories import call_factory, find_factory, suggest
from fxprune.models.weights import fit, state_of


def load_model(
    path: str | Path,
    arch: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
) -> nn.Module | Program:
    """Load a model from any supported kind of file, in evaluation mode.

    Args:
        path: a state dict (``.safetensors``, ``.pt``, ``.pth``), an exported program
            (``.pt2``, of ``torch.export.save`` or of ``fxprune.save``), or a pickled module.
        arch: architecture of a state dict: ``torchvision:resnet50``,
            ``timm:vit_tiny_patch16_224`` or ``package.module:factory``.
        options: keyword arguments for the architecture's factory.
        trust_pickle: allow unpickling, which can execute code stored in the file.

    Raises:
        InputError: the file is missing, damaged, of an unknown kind, needs ``trust_pickle``, or
            does not fit the architecture.

    """
    path = Path(path)
    _check_file(path)
    if path.suffix == ".pt2" or _is_archive(path):
        return _load_program(path, trust_pickle)
    content = _read(path, trust_pickle)
    if isinstance(content, nn.Module):
        return content.eval()
    state = state_of(content, path)
    if arch is None:
        raise InputError(
            f"{path} holds weights only ({plural(len(state), 'tensor')}); name their "
            "architecture with --arch torchvision:NAME, timm:NAME or package.module:factory"
        )
    model = build(arch, options or {})
    fit(model, state, path, arch)
    return model.eval()


def build(arch: str, options: Mapping[str, Any]) -> nn.Module:
    """Build the module of an architecture, with untrained weights.

    Raises:
        InputError: it does not exist (the message suggests similar names), or building it fails.

    """
    library, _, name = arch.partition(":")
    factory: Callable[..., Any]
    if not name:
        raise InputError(
            f"--arch {arch} names no library or module; write torchvision:{arch}, timm:{arch} "
            "or package.module:factory"
        )
    if library in ("torchvision", "timm"):
        factory = _from_library(library, name)
        # The weights come from the model's file; their name tells how images are prepared.
        options = {key: value for key, value in options.items() if key != "weights"}
    else:
        factory = find_factory(arch, "--arch")
    model = call_factory(factory, arch, "--arch", options)
    if not isinstance(model, nn.Module):
        raise InputError(f"--arch {arch} returns a {type(model).__name__}, not an nn.Module")
    return model


def _from_library(library: str, name: str) -> Callable[..., Any]:
    enable_torchvision()
    try:
        if library == "timm":
            import timm

            known = timm.list_models()
            make: Callable[..., Any] = timm.create_model
        else:
            from torchvision import models

            known = models.list_models()
            make = models.get_model
    except ImportError as error:
        raise InputError(
            f"--arch {library}:{name} needs {library}, which cannot be imported ({error}); "
            "install it with: pip install 'fxprune[vision]'"
        ) from error
    # timm knows pretrained tags as well: resnet50.a1_in1k
    if name.partition(".")[0] not in known:
        raise InputError(f"{library} has no model {name!r}{suggest(name, known)}")
    return lambda **options: make(name, **options)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a directory; give the model's file in it")
    if not path.exists():
        siblings = [item.name for item in path.parent.glob("*") if item.is_file()]
        raise InputError(f"there is no file {path}{suggest(path.name, siblings)}")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")


def _is_archive(path: Path) -> bool:
    """Whether the file is a zip archive that ``torch.save`` did not write."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return not any(name.rpartition("/")[2] == "data.pkl" for name in archive.namelist())


def _load_program(path: Path, trust_pickle: bool) -> nn.Module | Program:
    if not zipfile.is_zipfile(path):
        raise _broken(path, "it is not a complete zip archive")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if damaged := archive.testzip():
            raise _broken(path, f"its part {damaged} is damaged")
    if serialize.is_program(path):
        return serialize.load(path)
    if not any(name.endswith("archive_format") or name == "version" for name in names):
        raise _broken(path, "it is a zip archive, but holds no program")
    if not trust_pickle:
        check_exported(path)
    try:
        exported = torch.export.load(path)
    except Exception as error:
        raise _broken(path, f"torch.export.load failed: {error}") from error
    return from_exported(exported, _example_inputs(exported, path))


def _example_inputs(exported: ExportedProgram, path: Path) -> tuple[Any, ...]:
    if exported.example_inputs is None or exported.example_inputs[1]:
        raise InputError(
            f"{path} has no positional example inputs; export the model again with "
            "torch.export.export(model, (x,)), with all inputs as positional arguments"
        )
    inputs: tuple[Any, ...] = exported.example_inputs[0]
    return inputs


def _broken(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} cannot be read: {reason}; the file is truncated, damaged or not a model: copy or "
        "save it again"
    )


def _read(path: Path, trust_pickle: bool) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (safetensors.SafetensorError, ValueError) as error:
            raise _broken(path, str(error)) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not trust_pickle and _needs_code(error):
            raise InputError(
                f"{path} is a pickle of Python objects, and unpickling can execute code stored in "
                "the file; save model.state_dict() and name the architecture with --arch, or pass "
                "--trust-pickle if you trust the source of the file"
            ) from error
        if not trust_pickle:
            raise _broken(path, _first_line(error)) from error
    except Exception as error:
        raise _broken(path, _first_line(error)) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise _broken(path, f"{type(error).__name__}: {_first_line(error)}") from error


def _needs_code(error: pickle.UnpicklingError) -> bool:
    """Whether the safe unpickler refused a class or function, instead of failing on bad bytes."""
    return any(word in str(error) for word in ("Unsupported global", "Unsupported class", "GLOBAL"))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
