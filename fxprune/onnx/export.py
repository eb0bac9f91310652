"""Export programs to ONNX, and compare ONNX Runtime with PyTorch."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import EncodeError
from torch import Tensor, fx
from torch.export import Dim
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from fxprune.errors import ExportError, PostconditionError
from fxprune.files import replacing
from fxprune.graph.capture_check import other_batch
from fxprune.graph.decompose import spell_attention, spell_clamps
from fxprune.graph.precision import in_double, in_single, narrowed, widened
from fxprune.graph.program import Program
from fxprune.graph.surgery import insert_call, replace_node
from fxprune.onnx.explain import WITHOUT, explained, refuse_state, unusual_types
from fxprune.onnx.quantized_nodes import (
    GLOBAL_AVERAGE,
    TRANSLATIONS,
    is_quantized,
    shield_floats,
)
from fxprune.onnx.random_draws import draws, with_fixed_draws
from fxprune.onnx.runtime import apart, feeds, least_sizes, quiet, run, session_of
from fxprune.onnx.runtime_operators import RUNTIME_TRANSLATIONS, use_runtime_operators
from fxprune.onnx.trim import trim

aten = torch.ops.aten
PARITY_LIMIT = 1e-3
QUANTIZED_PARITY_LIMIT = 0.1
RUNTIME_FACTOR = 4.0  # what two runtimes may differ by, over what one differs from itself
BEYOND_STANDARD = "fxprune.beyond_standard"  # key in a file's metadata
ONE_FILE_LIMIT = 2**31 - 2**24  # protobuf holds less than 2 GiB; some room for the graph


@dataclass(frozen=True)
class ExportCheck:
    """Size of an exported file, and the difference between ONNX Runtime and PyTorch.

    Attributes:
        parity: the largest difference between outputs, relative to the largest output; None if
            not checked.
        onnx_bytes: size of the file, with external weights.
        limit: the largest difference allowed.
        note: why the limit is larger than ``parity_limit``, if it is.
        beyond_standard: the operators of ONNX Runtime that are not in the ONNX standard.

    """

    parity: float | None
    onnx_bytes: int
    limit: float = PARITY_LIMIT
    note: str | None = None
    beyond_standard: tuple[str, ...] = ()


def export_onnx(
    program: Program,
    path: str | Path,
    *,
    check: bool = True,
    standard: bool = False,
    samples: Sequence[tuple[Any, ...]] = (),
) -> ExportCheck:
    """Write a program as ONNX; the file appears only when it is complete and checked.

    The batch dimension is dynamic if the program's is. Weights are in the file itself unless they
    exceed 2 GiB. What ONNX Runtime cannot run in half or double precision is written in FP32.

    Args:
        program: the program to write; it does not change.
        path: path of the ONNX file.
        check: compare ONNX Runtime with PyTorch on the example inputs and, if the batch is
            dynamic, on another batch size. A program that draws random numbers is compared on
            fixed draws.
        samples: inputs of further calls to compare.
        standard: use only operators of the ONNX standard; without it, INT8 programs may use faster
            ones of ONNX Runtime, which the file's metadata lists as ``fxprune.beyond_standard``.

    Raises:
        ExportError: the program cannot be written as ONNX or run in ONNX Runtime; the message
            says why and what to do.
        PostconditionError: ONNX Runtime's outputs differ by more than ``parity_limit``, and by
            more than ONNX Runtime's with and without fused operators.

    """
    refuse_state(program)
    path, (ready, extras) = Path(path), _spelled(program, standard=standard)
    try:
        return _export(ready, path, extras, samples, check=check)
    except ExportError:
        if not (names := unusual_types(ready)):
            raise
    samples = [narrowed(one) for one in samples]
    found = _export(in_single(ready), path, extras, samples, check=check)
    note = f"the file computes in FP32: ONNX Runtime cannot run the model in {names}"
    return replace(found, note=note)


def _export(
    ready: Program,
    path: Path,
    extras: tuple[str, ...],
    samples: Sequence[tuple[Any, ...]],
    *,
    check: bool,
) -> ExportCheck:
    """Write a file beside its place, check it, and rename it into place."""
    with replacing(path) as staging:
        with explained(ready):
            _write(ready, staging, extras)
            size = sum(part.stat().st_size for part in staging.parent.iterdir())
            found = _checked(ready, staging, samples) if check else ExportCheck(None, 0)
        if found.parity is not None and not found.parity <= found.limit:
            raise PostconditionError(_difference(found, path))
    return replace(found, onnx_bytes=size, beyond_standard=extras)


def _difference(found: ExportCheck, path: Path) -> str:
    by = f"by {found.parity:.2e} of the largest value (limit {found.limit:g})"
    if found.parity == math.inf:
        by = "in which values are NaN or infinite, or in shape"
    return (
        f"ONNX Runtime's output differs from PyTorch's {by}, so {path} was not written; this is a "
        f"bug: please report it with the model; {WITHOUT}"
    )


def _spelled(program: Program, *, standard: bool) -> tuple[Program, tuple[str, ...]]:
    """Return a copy on the CPU, in evaluation mode, in the operators that the exporter knows.

    The second value names those beyond the ONNX standard.
    """
    ready = program.copy().to("cpu").eval()
    spell_attention(ready)
    spell_clamps(ready)
    _spell_averages(ready)
    ready.refresh()
    _return_tensors_alone(ready)
    shield_floats(ready)
    extras = () if standard else use_runtime_operators(ready)
    ready.refresh()
    return ready, extras


def _checked(program: Program, path: Path, samples: Sequence[tuple[Any, ...]]) -> ExportCheck:
    """Compare ONNX Runtime with PyTorch, on fixed draws if the program draws random numbers."""
    if not draws(program):
        return _compared(program, path, samples)
    session_of(path)
    fixed = with_fixed_draws(program)
    if fixed is None:
        return ExportCheck(None, 0, note="the model draws random numbers")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        other = Path(scratch) / path.name
        _write(fixed, other)
        found = _compared(fixed, other, samples)
    return replace(found, note=found.note or "compared on fixed random draws")


def _compared(program: Program, path: Path, samples: Sequence[tuple[Any, ...]]) -> ExportCheck:
    parity, limit = _parity(program, path, samples), parity_limit(program)
    if parity <= limit:
        return ExportCheck(parity, 0, limit)
    return ExportCheck(parity, 0, *_widened_limit(program, path, limit, samples))


def _parity(program: Program, path: Path, samples: Sequence[tuple[Any, ...]] = ()) -> float:
    """The largest relative difference of ONNX Runtime from PyTorch."""
    session, least = session_of(path), least_sizes(program)
    return max(
        apart(run(program, inputs), session.run(None, feeds(session, inputs)), least)
        for inputs in _calls(program, samples)
    )


def _calls(program: Program, samples: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The example inputs, further ones, and inputs of another size if sizes are dynamic."""
    other = other_batch(program, program.example_inputs)
    return [program.example_inputs, *samples, *([] if other is None else [other])]


def parity_limit(program: Program) -> float:
    """Return the largest difference from ONNX Runtime allowed, relative to the largest output.

    In INT8, rounding sometimes turns a difference in the last bit of a sum into a whole step, and
    later layers propagate it; so the limit is wider, and predictions are compared as well.
    """
    return QUANTIZED_PARITY_LIMIT if is_quantized(program) else PARITY_LIMIT


def _widened_limit(
    program: Program, path: Path, limit: float, samples: Sequence[tuple[Any, ...]]
) -> tuple[float, str | None]:
    """Return a wider limit if the program's outputs are numerically less certain, and the reason.

    If a last bit changes an 8-bit value by a whole step, or large values cancel, ONNX Runtime also
    differs from itself without fused operators, and FP32 differs from double precision.
    """
    plain, fused = session_of(path, fused=False), session_of(path)
    batches = _calls(program, samples)
    own = max(
        apart(plain.run(None, feeds(plain, inputs)), fused.run(None, feeds(fused, inputs)))
        for inputs in batches
    )
    note = f"ONNX Runtime with fused operators differs by {own:.1e} from itself without them"
    if not is_quantized(program):
        double = in_double(program)
        rounding = max(apart(run(double, widened(one)), run(program, one)) for one in batches)
        if rounding > own:
            own, note = rounding, f"FP32 differs by {rounding:.1e} from double precision"
    if not limit < RUNTIME_FACTOR * own < math.inf:
        return limit, None
    return RUNTIME_FACTOR * own, note


def _write(program: Program, path: Path, extras: tuple[str, ...] = ()) -> None:
    inputs, shapes = _doubled(program)
    weights = sum(t.numel() * t.element_size() for t in program.graph_module.state_dict().values())
    with quiet():
        onnx_program = torch.onnx.export(
            program.graph_module,
            (*inputs, {}),  # a last dictionary is taken for keyword arguments
            dynamo=True,
            dynamic_shapes=shapes,
            verbose=False,
            external_data=weights > ONE_FILE_LIMIT,
            custom_translation_table={**TRANSLATIONS, **RUNTIME_TRANSLATIONS},
        )
    assert onnx_program is not None
    trim(onnx_program.model)
    if extras:
        onnx_program.model.metadata_props[BEYOND_STANDARD] = ", ".join(extras)
    try:
        onnx_program.save(str(path), external_data=weights > ONE_FILE_LIMIT)
    except EncodeError:  # with folded constants even a smaller model may be too large
        onnx_program.save(str(path), external_data=True)


def _doubled(program: Program) -> tuple[tuple[Any, ...], Any]:
    """Example inputs with every dynamic size at least 2, and which sizes are dynamic."""
    leaves, spec = pytree.tree_flatten(program.example_inputs)
    dims = iter(program.dynamic)
    inputs: list[Any] = []
    shapes: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            inputs.append(leaf)
            shapes.append(None)
            continue
        dynamic = next(dims, frozenset())
        for dim in dynamic:
            if leaf.shape[dim] == 1:
                leaf = torch.cat([leaf, leaf], dim)
        inputs.append(leaf)
        shapes.append(dict.fromkeys(dynamic, Dim.AUTO) or None)
    shape_tree = pytree.tree_unflatten(shapes, spec) if program.dynamic else None
    return pytree.tree_unflatten(inputs, spec), shape_tree


def _return_tensors_alone(program: Program) -> None:
    """Leave None and numbers out of the outputs, which an ONNX file cannot return."""
    output = program.graph.output_node()
    leaves = pytree.tree_leaves(output.args[0])
    tensors = [
        leaf
        for leaf in leaves
        if isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("val"), Tensor)
    ]
    if len(tensors) == len(leaves):
        return
    output.args = (tuple(tensors),)
    codegen = program.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        spec = pytree.tree_structure(tuple(range(len(tensors))))
        program.graph.set_codegen(_PyTreeCodeGen(codegen.pytree_info._replace(out_spec=spec)))


def _spell_averages(program: Program) -> None:
    """Replace 1 x 1 adaptive pooling by a global average; the exporter adds gathers otherwise."""
    for node in list(program.graph.nodes):
        if node.target is aten.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:
            replace_node(program, node, insert_call(program, node, GLOBAL_AVERAGE, node.args[:1]))
