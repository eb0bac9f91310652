"""The captured program against the model: what it computes must be what the model computes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.errors import TraceError
from fxprune.graph.comparison import worst_error
from fxprune.graph.draws import FixedDraws
from fxprune.graph.functionalize import state_kept, state_of
from fxprune.graph.module_outputs import first_differing_module
from fxprune.graph.precision import in_double, widened
from fxprune.graph.program import Program, owner_of

Inputs = tuple[Any, ...]
# The largest relative error that rounding explains, by the type of the weights.
LIMITS = {torch.float16: 0.02, torch.bfloat16: 0.1, torch.float64: 1e-7}
LIMIT = 1e-4


@dataclass(frozen=True)
class _Difference:
    """The first call of several whose outputs differ: its number, and by how much."""

    call: int
    error: float


def check_capture(
    model: nn.Module, program: Program, calls: Sequence[Inputs], *, training: bool = False
) -> tuple[str, ...]:
    """Compare a program with the model that it was captured from, in calls one after the other.

    Neither the model nor the program changes. In single precision, a difference counts only if it
    is there in double precision too. Calls that the model itself cannot make are left out.

    Args:
        model: what was captured.
        program: the capture.
        calls: positional inputs of each call; a repeated call shows state that is not captured.
        training: compare in training mode, with random operators off (``FixedDraws``).

    Returns:
        Notes on what training of the program leaves out, such as auxiliary outputs, or on why
        nothing was compared.

    Raises:
        TraceError: the outputs differ; the message names the first module whose output does.

    """
    if _lacks_values(model, program, calls):
        return ("the program was not compared with the model, whose tensors have no values (meta)",)
    with torch.no_grad():
        found = _first_difference(model, program, calls, training=training)
        if found is not None and _dtype(program) in (torch.float32, torch.float16, torch.bfloat16):
            found = _in_double(model, program, calls, found, training=training)
        if found is not None:
            raise TraceError(_complaint(model, program, calls, found, training=training))
        return _left_out(model, program, calls, training=training)


def _lacks_values(model: nn.Module, program: Program, calls: Sequence[Inputs]) -> bool:
    """Whether a tensor lies on the meta device, where nothing can be computed."""
    stored = (*model.parameters(), *model.buffers(), *program.graph_module.parameters())
    leaves = (*stored, *pytree.tree_leaves(list(calls)))
    return any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves)


def other_batch(program: Program, inputs: Inputs) -> Inputs | None:
    """Return inputs with twice the size in every dynamic dimension, in another order.

    Returns None for a program whose sizes are all fixed.
    """
    if not any(program.dynamic):
        return None
    dims = iter(program.dynamic)

    def grown(tensor: Tensor) -> Tensor:
        for dim in sorted(next(dims, frozenset())):
            tensor = torch.cat([tensor, tensor.roll(1, dim)], dim)
        return tensor

    return pytree.tree_map_only(Tensor, grown, inputs)  # type: ignore[no-any-return]


def _first_difference(
    model: nn.Module, program: Program, calls: Sequence[Inputs], *, training: bool
) -> _Difference | None:
    with _twins(model, program, training=training) as (left, right):
        for number, inputs in enumerate(calls):
            try:
                expected = left(*_fresh(inputs))
            except Exception:  # the model does not take these
                continue
            error = _error(expected, right, inputs, training=training)
            if not error <= LIMITS.get(_dtype(program), LIMIT):
                return _Difference(number, error)
    return None


def _error(expected: Any, program: Program, inputs: Inputs, *, training: bool) -> float:
    try:
        found = program(*_fresh(inputs))
    except Exception as error:
        raise TraceError(
            f"the captured program does not run where the model does, on inputs of "
            f"{_shapes(inputs)}: {str(error).strip().splitlines()[0]}; capture the model with "
            "example inputs of that size"
        ) from error
    left, right = pytree.tree_leaves(expected), pytree.tree_leaves(found)
    if training and len(left) != len(right):  # auxiliary outputs
        left, right = left[:1], right[:1]
    return worst_error(left, right)


def _in_double(
    model: nn.Module,
    program: Program,
    calls: Sequence[Inputs],
    found: _Difference,
    *,
    training: bool,
) -> _Difference | None:
    """Look for the difference in double precision; where that cannot be run, it stands."""
    try:
        wide, exact = copy.deepcopy(model).double(), in_double(program)
        calls = [widened(inputs) for inputs in calls]
        return _first_difference(wide, exact, calls, training=training)
    except TraceError:
        raise
    except Exception:  # whatever the model raises in double precision, the difference was seen
        return found


@contextmanager
def _twins(
    model: nn.Module, program: Program, *, training: bool
) -> Iterator[tuple[nn.Module, Program]]:
    """Yield copies of both, in the wanted mode, which share their parameters with the originals."""
    left, right = _twin(model), program.copy(share=True)
    written = state_of(program)
    random = training or _draws(program)
    modes = [(module, module.training) for module in left.modules()]
    with ExitStack() as stack:
        stack.enter_context(_buffers_kept(model, written))
        stack.enter_context(_buffers_kept(right.graph_module, ()))
        stack.enter_context(state_kept(right))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(FixedDraws(0.0 if training else 0.5) if random else nullcontext())
        try:
            yield left.train(training), right.train(training)
        finally:
            for module, mode in modes:
                module.training = mode


def _twin(model: nn.Module) -> nn.Module:
    """A copy with buffers and attributes of its own; the model itself if it cannot be copied."""
    try:
        return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    except Exception:  # copying runs code of the model's own
        return model


@contextmanager
def _buffers_kept(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Put back all buffers at the end, and the tensors of the given names where there are such."""
    tensors = dict(module.named_parameters(remove_duplicate=False))
    kept = list(module.buffers()) + [tensors[name] for name in names if name in tensors]
    before = [tensor.detach().clone() for tensor in kept]
    owners = {id(tensor): tensor for tensor in kept}
    assigned = [
        (owner_of(module, name), tensor)
        for name, tensor in module.named_buffers(remove_duplicate=False)
        if id(tensor) in owners
    ]
    try:
        yield
    finally:
        for tensor, value in zip(kept, before, strict=True):
            tensor.detach().copy_(value)
        for (owner, leaf), tensor in assigned:
            setattr(owner, leaf, tensor)


def _fresh(inputs: Inputs) -> Inputs:
    """Copies of the inputs, which the model may write into."""
    return pytree.tree_map_only(Tensor, torch.clone, inputs)  # type: ignore[no-any-return]


def _draws(program: Program) -> bool:
    return any(
        torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        for node in program.graph.nodes
    )


def _dtype(program: Program) -> torch.dtype:
    stored = program.graph_module.parameters()
    given = (
        leaf for leaf in pytree.tree_leaves(program.example_inputs) if isinstance(leaf, Tensor)
    )
    floats = (tensor.dtype for tensor in (*stored, *given) if tensor.is_floating_point())
    return next(floats, torch.float32)


def _shapes(inputs: Inputs) -> str:
    return ", ".join(
        "x".join(map(str, leaf.shape)) if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in pytree.tree_leaves(inputs)
    )


def _left_out(
    model: nn.Module, program: Program, calls: Sequence[Inputs], *, training: bool
) -> tuple[str, ...]:
    """Say what the model does in training mode that the program does not."""
    if not training or not calls:
        return ()
    notes = []
    with _twins(model, program, training=True) as (left, right):
        try:
            counts = [len(pytree.tree_leaves(one(*_fresh(calls[0])))) for one in (left, right)]
        except Exception:  # the model does not run in training mode on these inputs
            return ()
    if counts[0] != counts[1]:
        notes.append(
            f"training: in training mode the model returns {counts[0]} values; only what it "
            "returns in evaluation mode is trained"
        )
    dropped = sorted({type(module).__name__ for module in model.modules() if _drops_paths(module)})
    if dropped:
        notes.append(f"training: stochastic depth ({', '.join(dropped)}) was left out at capture")
    return tuple(notes)


def _drops_paths(module: nn.Module) -> bool:
    """Whether a module skips itself at random in training, by the names that libraries use."""
    name = type(module).__name__.lower()
    rates = [getattr(module, key, None) for key in ("drop_prob", "p", "drop_path_rate")]
    return ("droppath" in name or "stochasticdepth" in name) and any(rates)


def _complaint(
    model: nn.Module,
    program: Program,
    calls: Sequence[Inputs],
    found: _Difference,
    *,
    training: bool,
) -> str:
    inputs, name = calls[found.call], type(model).__name__
    mode = "in training mode, with random operators off, " if training else ""
    by = f"by {found.error:.1e} of the largest value"
    if found.error == math.inf:
        by = "in their shapes, or in which of their values are NaN or infinite"
    module = _first_module(model, program, inputs, training=training)
    where = f"; the first module whose output differs is '{module}'" if module else ""
    repeated = found.call > 0 and calls[found.call] is calls[found.call - 1]
    advice = (
        "it may branch on the batch size or its mode, keep state outside of its buffers, or draw "
        "numbers outside of PyTorch; capture the part without that"
    )
    if repeated:
        advice = (
            "it keeps something between calls that is not in its buffers; register that with "
            "register_buffer and write into it"
        )
    return (
        f"{mode}the captured program of {name} and {name} itself differ on inputs of "
        f"{_shapes(inputs)} {by}{where}: {advice}"
    )


def _first_module(
    model: nn.Module, program: Program, inputs: Inputs, *, training: bool
) -> str | None:
    limit = LIMITS.get(_dtype(program), LIMIT)
    with _twins(model, program, training=training) as (left, right):
        if left is model:  # it could not be copied, and must not keep the hooks
            return None
        return first_differing_module(left, right, _fresh(inputs), limit)
