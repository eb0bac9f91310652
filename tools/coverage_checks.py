"""Test one model: trace, groups, removal, forward, backward, exactness, ONNX."""

from __future__ import annotations

import ctypes
import gc
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fxprune
from fxprune.errors import FxpruneError
from fxprune.graph.comparison import relative_error
from fxprune.graph.program import Program
from fxprune.onnx.export import export_onnx
from fxprune.structure.branches import find_branches, remove_branch, silence_error
from fxprune.structure.groups import Group
from fxprune.structure.verify import sample_units, verify_removal
from tools.coverage_models import build, enliven

EXACT = {torch.float32: 1e-5, torch.float64: 1e-10}
Record = dict[str, Any]


def examine(suite: str, name: str, onnx: bool, tell: Callable[[Record], None]) -> Record:
    """Try everything on one model; ``tell`` hears the record after every step."""
    record: Record = {"suite": suite, "model": name, "onnx": onnx, "failed": None, "why": None}
    step = "build"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step in _steps(record, onnx):
                record["step"] = step
                tell(record)
    except Exception as error:  # whatever a model does to us is a line of the table
        record.update(failed=record.get("step", step), why=f"{type(error).__name__}: {error}"[:600])
    return record


def _steps(record: Record, onnx: bool) -> Iterator[str]:
    """Yield the name of each step ahead of doing it."""
    yield "build"
    torch.manual_seed(0)
    model, inputs = build(record["suite"], record["model"])
    enliven(model)
    yield "trace"
    # What is imported, or set up for good, the first time.
    fxprune.find_groups(fxprune.trace(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)))
    program, record["trace_s"] = _timed(lambda: fxprune.trace(model, inputs))
    record["nodes"], record["params"] = len(program.graph.nodes), fxprune.cost(program).params
    yield "groups"
    record["groups_peak_mib"], (groups, record["groups_s"]) = _peak(
        lambda: _timed(lambda: fxprune.find_groups(program))
    )
    record.update(_shares(program, groups))
    yield "dense forward"
    with torch.no_grad():
        record["forward_peak_mib"], dense = _peak(lambda: program(*inputs))
    yield "branches"
    record.update(_branches(program))
    doomed = sample_units(groups, 0.5)
    yield "exactness"
    record.update(_exactness(program, doomed))
    yield "removal"
    _, record["removal_s"] = _timed(lambda: fxprune.remove_units(program, doomed))
    record["params_left"] = fxprune.cost(program).params / record["params"]
    yield "forward"
    record["changed"] = _forward(program, dense)
    yield "backward"
    _backward(program)
    if onnx:
        yield "onnx"
        with tempfile.TemporaryDirectory() as folder:
            record["parity"] = export_onnx(program, Path(folder) / "model.onnx").parity
    yield "done"


def _branches(program: Program) -> Record:
    """Remove half of the residual branches of a copy, chosen at random; hold it to silence."""
    found, smaller = find_branches(program), program.copy()
    order: list[int] = np.random.default_rng(0).permutation(len(found)).tolist()
    silent = [found[number] for number in order[: (len(found) + 1) // 2]]
    names = {branch.add.name for branch in silent}
    while left := [branch for branch in find_branches(smaller) if branch.add.name in names]:
        remove_branch(smaller, left[0])
    error = silence_error(program, silent, smaller)
    if not error <= EXACT[torch.float32]:
        raise AssertionError(f"without {len(silent)} branches the output is off by {error:.1e}")
    return {"branches": len(found), "branches_removed": len(silent), "branches_error": error}


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), round(time.process_time() - start, 3)


def _peak(work: Callable[[], Any]) -> tuple[float | None, Any]:
    """Return how much the resident memory rose at most while working, in MiB (Linux only).

    Memory that was freed goes back to the system first, or work would find some at hand.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return None, work()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = _resident(status, "VmRSS")
    result = work()
    return round((_resident(status, "VmHWM") - before) / 1024, 1), result


def _resident(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def _shares(program: Program, groups: tuple[Group, ...]) -> Record:
    """How many parameters die with some unit that may be removed, and what is frozen and why."""
    parameters = _parameters(program)
    total = sum(parameter.numel() for parameter in parameters.values())
    free = [group for group in groups if group.frozen_because is None and len(group.units) > 1]
    covered = _covered(parameters, free)
    frozen: list[Record] = []
    for group in groups:
        if group.frozen_because is not None:
            share = sum(_covered(parameters, [group]).values()) / total
            frozen.append({"group": group.name, "units": len(group.units), "share": round(share, 4),
                           "because": group.frozen_because})  # fmt: skip
    frozen.sort(key=lambda entry: -float(entry["share"]))
    return {
        "groups": len(groups),
        "free_groups": len(free),
        "units": sum(len(group.units) for group in free),
        "share": round(sum(covered.values()) / total, 4),
        "tensors_held": _held(parameters, covered),
        "frozen": frozen[:12],
    }


def _parameters(program: Program) -> dict[str, torch.nn.Parameter]:
    """Return what the graph reads, by the name that it reads it under first."""
    first: dict[torch.nn.Parameter, str] = {}
    for node in program.tensor_nodes():
        tensor = program.tensor(str(node.target))
        if isinstance(tensor, torch.nn.Parameter):
            first.setdefault(tensor, str(node.target))
    return {name: tensor for tensor, name in first.items()}


def _held(parameters: dict[str, torch.nn.Parameter], covered: dict[str, int]) -> list[str]:
    """Name the largest parameters of which nothing may be removed."""
    left = [(-p.numel(), name) for name, p in parameters.items() if not covered.get(name)]
    return [f"{name} ({-size})" for size, name in sorted(left)[:5]]


def _covered(parameters: dict[str, torch.nn.Parameter], groups: list[Group]) -> dict[str, int]:
    """Count, per parameter, the elements that lie on some place of some group."""
    kept: dict[str, dict[int, np.ndarray[Any, Any]]] = {}
    for group in groups:
        for slot in group.slots:
            if slot.tensor in parameters:
                size = parameters[slot.tensor].shape[slot.dim]
                mask = kept.setdefault(slot.tensor, {}).setdefault(slot.dim, np.ones(size, bool))
                mask[group.places(slot)[1]] = False
    return {
        name: parameters[name].numel()
        - int(np.prod([
            masks[dim].sum() if dim in masks else size
            for dim, size in enumerate(parameters[name].shape)
        ]))
        for name, masks in kept.items()
    }  # fmt: skip


def _exactness(program: Program, doomed: dict[Group, list[int]]) -> Record:
    """Zero-then-remove on the groups that no normalisation mixes; in doubles where in doubt."""
    exact = {group: units for group, units in doomed.items() if not group.mixed_by}
    found: Record = {"exact_groups": len(exact), "mixed_groups": len(doomed) - len(exact)}
    if not exact:
        return {**found, "error": None}
    error, limit = verify_removal(program, exact).error, EXACT[torch.float32]
    if error is None or not error <= limit:
        error = verify_removal(_doubled(program), exact).error
        limit, found["precision"] = EXACT[torch.float64], "float64"
    if error is None or not error <= limit:
        raise FxpruneError(f"zero-then-remove differs by {error}")
    return {**found, "error": error}


def _doubled(program: Program) -> Program:
    """Return a copy that computes in double precision."""
    copy = program.copy()
    copy.graph_module.double()
    for node in copy.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(
            lambda value: torch.float64 if value is torch.float32 else value,
            (node.args, node.kwargs),
        )
    copy.example_inputs = pytree.tree_map_only(
        Tensor,
        lambda leaf: leaf.double() if leaf.is_floating_point() else leaf,
        copy.example_inputs,
    )
    copy.refresh()
    return copy


def _floats(outputs: Any) -> list[Tensor]:
    return [
        leaf for leaf in pytree.tree_leaves(outputs)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]  # fmt: skip


def _forward(program: Program, dense: Any) -> float:
    """Check shapes at two batch sizes; return how much removal changed the output."""
    inputs = program.example_inputs
    with torch.no_grad():
        found, expected = _floats(program(*inputs)), _floats(dense)
        if [leaf.shape for leaf in found] != [leaf.shape for leaf in expected]:
            raise FxpruneError("the outputs changed their shapes")
        if not all(bool(leaf.isfinite().all()) for leaf in [*found, *expected]):
            raise FxpruneError("the outputs are not finite")
        if any(program.dynamic):
            program(*pytree.tree_map_only(Tensor, lambda leaf: torch.cat([leaf, leaf]), inputs))
    return max(map(relative_error, expected, found))


def _backward(program: Program) -> None:
    """Gradients are finite and of the right shape; what no output depends on has none."""
    for tensor in program.graph_module.parameters():
        tensor.requires_grad_(tensor.is_floating_point())
    losses = [leaf.pow(2).mean() for leaf in _floats(program(*program.example_inputs))]
    torch.stack(losses).sum().backward()
    reached = [item for item in program.graph_module.named_parameters() if item[1].grad is not None]
    if not reached:
        raise FxpruneError("no parameter has a gradient")
    for name, parameter in reached:
        assert parameter.grad is not None
        if parameter.grad.shape != parameter.shape or not bool(parameter.grad.isfinite().all()):
            raise FxpruneError(f"the gradient of {name} is wrong")
