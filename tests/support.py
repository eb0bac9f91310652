"""What tests of several modules share: one check for every pass, tolerances, an oracle."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune.graph.program import Program
from fxprune.graph.text import graph_text
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Outcome, Pass
from fxprune.structure.groups import Group

# The largest relative error between two ways to compute one function, once for all tests.
TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.float64: 1e-10}


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest difference between two outputs, relative to the largest value."""
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    errors = [
        float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-30))
        for a, b in pairs
        if isinstance(b, Tensor)
    ]
    return max(errors)


def assert_same(actual: Any, expected: Any) -> None:
    """Fail unless two outputs agree to the tolerance of their type."""
    dtype = next(leaf for leaf in pytree.tree_leaves(expected) if isinstance(leaf, Tensor)).dtype
    error = relative_error(actual, expected)
    assert error <= TOLERANCE[dtype], f"relative error {error:.1e} in {dtype}"


def randomise_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms random statistics and scales, so that none is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(generator=generator)
    return model


def trace(model: nn.Module, *inputs: Any) -> Program:
    """Trace a model, with random batch-norm statistics already in place."""
    return fxprune.trace(model, inputs)


def check(
    step: Pass,
    model: nn.Module | Program,
    x: Tensor | tuple[Any, ...],
    before: str | None = None,
    after: str | None = None,
    *,
    same_function: bool = True,
    context: Context | None = None,
) -> Outcome:
    """Assert all that a pass owes to its caller; return what it said it did.

    The graph text before and after, if given; that ``changes`` is zero exactly if nothing moved;
    that the outputs keep their shapes and, if promised, their values, at two batch sizes; that a
    second run does nothing, unless the pass uses up what it reads or says why it ``repeats``.
    """
    context = context or Context()
    inputs = x if isinstance(x, tuple) else (x,)
    program = model if isinstance(model, Program) else trace(model, *inputs)
    dense, first = program.copy(), _state(program)
    if before is not None:
        assert graph_text(program) == _clean(before), _differs("before", graph_text(program))
    outcome = step(program, context)
    if after is not None:
        assert graph_text(program) == _clean(after), _differs("after", graph_text(program))
    assert (outcome.changes > 0) == (_state(program) != first)
    for batch in (inputs, doubled(inputs) if program.dynamic else inputs):
        with torch.no_grad():
            actual, expected = program(*batch), dense(*batch)
        assert pytree.tree_map_only(Tensor, lambda leaf: leaf.shape, actual) == (
            pytree.tree_map_only(Tensor, lambda leaf: leaf.shape, expected)
        )
        if same_function:
            assert_same(actual, expected)
    if step.repeats is None and all(fact.name in program.facts for fact in step.needs):
        last = _state(program)
        assert step(program, context).changes == 0, "a second run still changes something"
        assert _state(program) == last
    return outcome


def _state(program: Program) -> tuple[str, dict[str, bytes]]:
    """The graph, and all weights to the bit."""
    weights = {
        name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in program.graph_module.state_dict().items()
    }
    return graph_text(program), weights


def initializer_elements(path: str | Path) -> int:
    """Count the elements of all weights in an ONNX file."""
    model = onnx.load(str(path), load_external_data=False)
    return sum(math.prod(tensor.dims) for tensor in model.graph.initializer)


def doubled(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Stack a batch on its own negative, along dimension 0."""
    return pytree.tree_map_only(  # type: ignore[no-any-return]
        Tensor, lambda leaf: torch.cat([leaf, -leaf if leaf.is_floating_point() else leaf]), inputs
    )


def _clean(text: str) -> str:
    return textwrap.dedent(text).strip()


def _differs(which: str, actual: str) -> str:
    return f"the graph {which} is\n{actual}"


def without_readers(model: nn.Module, doomed: Mapping[Group, Sequence[int]]) -> nn.Module:
    """Return a copy of a model in which nothing reads the doomed units.

    An oracle for removal that shares no code with it: goes by the names and the types of modules.
    A weight reads along its input dimension, 1 for linear layers and convolutions and 0 for
    transposed ones; zeroed there, it ignores the unit, whatever the unit then computes.
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            reads = _input_dimension(module)
            if reads is None:
                continue
            for group, units in doomed.items():
                for slot in group.slots:
                    if (slot.tensor, slot.dim) == (f"{name}.weight", reads):
                        numbers, indices = group.places(slot)
                        chosen = torch.from_numpy(indices)[_is_in(numbers, units)]
                        module.get_parameter("weight").index_fill_(reads, chosen, 0)
    return model


def _is_in(numbers: Any, units: Sequence[int]) -> Tensor:
    return torch.isin(torch.from_numpy(numbers), torch.tensor(list(units)))


def _input_dimension(module: nn.Module) -> int | None:
    match module:
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            return 0
        case nn.Linear() | nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            return 1
        case _:
            return None
