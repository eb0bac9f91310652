"""Capture: a PyTorch module becomes a program, through ``torch.export`` (non-strict)."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from fxprune.errors import TraceError
from fxprune.graph.canonical import canonicalise
from fxprune.graph.capture_check import check_capture, other_batch
from fxprune.graph.capture_patches import captured_as_called
from fxprune.graph.program import Program

log = logging.getLogger(__name__)


def trace(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    dynamic: Mapping[int, frozenset[int]] | None = None,
    check: bool = True,
) -> Program:
    """Capture a model as a program; the model itself is left as it was.

    The graph is that of evaluation mode: batch norm and dropout stay whole and can be switched by
    ``Program.train``, stochastic depth is gone. Sizes are literals except for dynamic dimensions.

    Args:
        model: any module that ``torch.export`` can capture; ``nn.DataParallel`` and
            ``torch.compile`` around it are ignored.
        example_inputs: positional inputs; a batch of one is enough.
        dynamic: per flattened tensor input (by number), the dimensions that may vary. By default
            dimension 0 of every input, if they all agree on its size and the model permits.
        check: run the model and the program on the example inputs, twice and, where sizes are
            dynamic, on inputs of twice the size, and compare them.

    Raises:
        TraceError: ``torch.export`` cannot capture the model, and the message carries its reason;
            or the program computes something else, and the message names the module.

    """
    if not isinstance(example_inputs, tuple):
        raise TraceError(
            f"example_inputs must be a tuple of positional inputs, not a "
            f"{type(example_inputs).__name__}; write trace(model, (x,))"
        )
    model = unwrapped(model)
    wanted = _batch_dimensions(example_inputs) if dynamic is None else dict(dynamic)
    with _evaluation(model), captured_as_called(model), torch.no_grad():
        with torch.compiler.set_stance("force_eager"):  # compiled parts run as they are written
            exported = _export(model, example_inputs, wanted)
        if _lacks_weights(exported):  # conditions are captured by what was switched off
            exported = _export(model, example_inputs, wanted)
    program = from_exported(exported, example_inputs)
    if check:
        other = other_batch(program, example_inputs)
        calls = [example_inputs, example_inputs, *([] if other is None else [other])]
        check_capture(model, program, calls)
    return program


def from_exported(exported: ExportedProgram, example_inputs: tuple[Any, ...]) -> Program:
    """Make a program of what ``torch.export`` captured; its tensors are copied."""
    try:
        module = exported.module()
    except KeyError as error:  # a parameter named like an attribute of GraphModule
        reason = str(error.args[0])
        raise TraceError(
            f"the captured model cannot be made a module: {reason}; rename that parameter or buffer"
        ) from error
    graph_module = copy.deepcopy(fx.GraphModule(module, module.graph, "Program"))
    program = Program(graph_module, example_inputs, _dynamic_dimensions(exported))
    canonicalise(program)
    program.refresh()
    return program


def _lacks_weights(exported: ExportedProgram) -> bool:
    """Whether branches of a condition read weights that are only stand-ins."""
    return any(isinstance(item, FakeTensor) for item in exported.graph_module.parameters())


def _batch_dimensions(inputs: tuple[Any, ...]) -> dict[int, frozenset[int]]:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    sizes = {tensor.shape[0] for tensor in tensors if tensor.dim()}
    if len(sizes) != 1:
        return {}
    return {number: frozenset({0}) for number, tensor in enumerate(tensors) if tensor.dim()}


def _export(
    model: nn.Module, inputs: tuple[Any, ...], dynamic: Mapping[int, frozenset[int]]
) -> ExportedProgram:
    """Export with the dimensions dynamic if the model permits, else with none."""
    if dynamic:
        try:
            exported = _export_dynamic(model, inputs, dynamic)
        except Exception as error:
            # torch.export raises many types; the static attempt below reports what is fatal.
            log.info("dynamic capture failed, capturing with fixed sizes: %s", error)
        else:
            if _dynamic_dimensions(exported) or _same_batch(exported, inputs):
                return exported
    try:
        return torch.export.export(model, inputs, strict=False)
    except Exception as error:
        _check_that_it_runs(model, inputs)
        reason = f"{type(error).__name__}: {error}".strip().split("\n\n")[0]
        raise TraceError(
            f"torch.export cannot capture {type(model).__name__}: {reason}. "
            "Data-dependent control flow is the usual cause; capture the part without it, such as "
            "a detection model's backbone"
        ) from error


def _check_that_it_runs(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    try:
        model(*inputs)
    except Exception as error:
        shapes = [
            "x".join(map(str, leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__
            for leaf in pytree.tree_leaves(inputs)
        ]
        raise TraceError(
            f"{type(model).__name__} does not run on inputs of {', '.join(shapes)} (a batch of "
            f"samples): {str(error).strip().splitlines()[0]}; give it inputs like those it was "
            "trained on"
        ) from error


def _export_dynamic(
    model: nn.Module, inputs: tuple[Any, ...], dynamic: Mapping[int, frozenset[int]]
) -> ExportedProgram:
    leaves, spec = pytree.tree_flatten(inputs)
    number = 0
    doubled: list[Any] = []
    shapes: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            doubled.append(leaf)
            shapes.append(None)
            continue
        dims = dynamic.get(number, frozenset())
        number += 1
        for dim in dims:  # a size of one would be taken for a constant
            if leaf.shape[dim] == 1:
                leaf = torch.cat([leaf, leaf], dim)
        doubled.append(leaf)
        shapes.append(dict.fromkeys(dims, Dim.AUTO) or None)
    return torch.export.export(
        model,
        pytree.tree_unflatten(doubled, spec),
        dynamic_shapes=_by_parameter(model, pytree.tree_unflatten(shapes, spec)),
        strict=False,
    )


def _by_parameter(model: nn.Module, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Group positional values as forward's parameters do: ``*args`` is one tuple of them."""
    bound = inspect.signature(model.forward).bind(*values).arguments
    return tuple(bound.values())


def required_inputs(model: nn.Module | Program) -> int | None:
    """Return how many positional inputs a model needs; None if its signature does not say."""
    if isinstance(model, Program):
        return len(model.example_inputs)
    parameters = inspect.signature(unwrapped(model).forward).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in positional and one.default is one.empty for one in parameters)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside wrappers that only change how it runs, not what it computes."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # of torch.compile
        if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _placeholders(exported: ExportedProgram) -> list[Tensor]:
    names = set(exported.graph_signature.user_inputs)
    values = [
        n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder" and n.name in names
    ]
    return [value for value in values if isinstance(value, Tensor)]


def _dynamic_dimensions(exported: ExportedProgram) -> tuple[frozenset[int], ...]:
    found = tuple(
        frozenset(d for d, size in enumerate(value.shape) if not _is_fixed(size))
        for value in _placeholders(exported)
    )
    return found if any(found) else ()


def _is_fixed(size: int | torch.SymInt) -> bool:
    # A symbol that a later literal pinned (view(4, ...)) stays a SymInt, with a known value.
    return isinstance(size, int) or size.node.maybe_as_int() is not None


def _same_batch(exported: ExportedProgram, inputs: tuple[Any, ...]) -> bool:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return all(
        tuple(value.shape) == tuple(tensor.shape)
        for value, tensor in zip(_placeholders(exported), tensors, strict=True)
    )


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with warnings.catch_warnings():
            # Recurrent layers keep a list of their weights, which torch.export notices.
            warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")
            yield
    finally:
        for module, mode in modes:
            module.training = mode
