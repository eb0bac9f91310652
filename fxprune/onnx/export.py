"""Export programs to ONNX, and compare ONNX Runtime with PyTorch."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from google.protobuf.message import EncodeError
from torch import Tensor, fx
from torch.export import Dim
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from fxprune.errors import PostconditionError
from fxprune.files import replacing
from fxprune.graph.comparison import relative_error
from fxprune.graph.decompose import spell_attention, spell_clamps
from fxprune.graph.precision import in_double, widened
from fxprune.graph.program import Program
from fxprune.graph.surgery import insert_call, replace_node
from fxprune.onnx.quantized_nodes import (
    GLOBAL_AVERAGE,
    TRANSLATIONS,
    is_quantized,
    shield_floats,
)
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
    program: Program, path: str | Path, *, check: bool = True, standard: bool = False
) -> ExportCheck:
    """Write a program as ONNX; the file appears only when it is complete and checked.

    The batch dimension is dynamic if the program's is. Weights are in the file itself unless they
    exceed 2 GiB.

    Args:
        program: the program to write; it does not change.
        path: path of the ONNX file.
        check: compare ONNX Runtime with PyTorch on the example inputs and, if the batch is
            dynamic, on another batch size.
        standard: use only operators of the ONNX standard; without it, INT8 programs may use faster
            ones of ONNX Runtime, which the file's metadata lists as ``fxprune.beyond_standard``.

    Raises:
        PostconditionError: ONNX Runtime's outputs differ by more than ``parity_limit``, and by
            more than ONNX Runtime's with and without fused operators.

    """
    path = Path(path)
    ready = program.copy().to("cpu").eval()
    spell_attention(ready)
    spell_clamps(ready)
    _spell_averages(ready)
    _return_tensors_alone(ready)
    shield_floats(ready)
    extras = () if standard else use_runtime_operators(ready)
    ready.refresh()
    with replacing(path) as staging:
        with _quiet():
            _write(ready, staging, extras)
        parity = _parity(ready, staging) if check else None
        limit, note = parity_limit(ready), None
        if parity is not None and not parity <= limit:
            limit, note = _widened_limit(ready, staging, limit)
        if parity is not None and not parity <= limit:
            raise PostconditionError(
                f"ONNX Runtime's output differs from PyTorch's by {parity:.2e} of the largest "
                f"value (limit {limit:g}), so {path} was not written; this is a bug: please report "
                "it with the model"
            )
        size = sum(part.stat().st_size for part in staging.parent.iterdir())
    return ExportCheck(parity, size, limit, note, extras)


def parity_limit(program: Program) -> float:
    """Return the largest difference from ONNX Runtime allowed, relative to the largest output.

    In INT8, rounding sometimes turns a difference in the last bit of a sum into a whole step, and
    later layers propagate it; so the limit is wider, and predictions are compared as well.
    """
    return QUANTIZED_PARITY_LIMIT if is_quantized(program) else PARITY_LIMIT


def _widened_limit(program: Program, path: Path, limit: float) -> tuple[float, str | None]:
    """Return a wider limit if the program's outputs are numerically less certain, and the reason.

    If a last bit changes an 8-bit value by a whole step, or large values cancel, ONNX Runtime also
    differs from itself without fused operators, and FP32 differs from double precision.
    """
    plain, fused = _session(path, fused=False), _session(path)
    batches = program.example_inputs, _doubled(program)[0]
    own = max(
        _apart(plain.run(None, feeds(plain, inputs)), fused.run(None, feeds(fused, inputs)))
        for inputs in batches
    )
    note = f"ONNX Runtime with fused operators differs by {own:.1e} from itself without them"
    if not is_quantized(program):
        double = in_double(program)
        rounding = max(_apart(_run(double, widened(one)), _run(program, one)) for one in batches)
        if rounding > own:
            own, note = rounding, f"FP32 differs by {rounding:.1e} from double precision"
    if not limit < RUNTIME_FACTOR * own < math.inf:
        return limit, None
    return RUNTIME_FACTOR * own, note


def _run(program: Program, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Return the tensors that a program returns."""
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(program(*inputs)) if isinstance(t, Tensor)]


def _write(program: Program, path: Path, extras: tuple[str, ...] = ()) -> None:
    inputs, shapes = _doubled(program)
    weights = sum(t.numel() * t.element_size() for t in program.graph_module.state_dict().values())
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


def _parity(program: Program, path: Path) -> float:
    session = _session(path)
    worst = 0.0
    for inputs in (program.example_inputs, _doubled(program)[0]):
        worst = max(worst, _apart(_run(program, inputs), session.run(None, feeds(session, inputs))))
    return worst


def _session(path: Path, *, fused: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _apart(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """The largest relative difference between outputs."""
    pairs = zip(map(torch.as_tensor, expected), map(torch.as_tensor, found), strict=True)
    return max((relative_error(left, right) for left, right in pairs), default=0.0)


def feeds(session: onnxruntime.InferenceSession, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Return a program's inputs under the input names of an ONNX Runtime session."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    names = [item.name for item in session.get_inputs()]
    return {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=False)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's progress lines and its warnings about its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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
