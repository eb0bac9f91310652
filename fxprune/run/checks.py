"""What a run checks: that the data suit the model, and that the result is what it should be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.calibration.outputs import class_axis, logits_of
from fxprune.calibration.running import fixed_batch
from fxprune.data.batches import batches
from fxprune.data.roles import Data
from fxprune.data.sources import check_inputs, check_labels
from fxprune.errors import InputError
from fxprune.graph.comparison import worst_error
from fxprune.graph.draws import FixedDraws
from fxprune.graph.facts import MASKS
from fxprune.graph.first_nan import first_nan
from fxprune.graph.functionalize import state_kept
from fxprune.graph.notebook import plural
from fxprune.graph.precision import in_double
from fxprune.graph.program import Program
from fxprune.onnx.export import ExportCheck
from fxprune.report.content import Check
from fxprune.run.quantized_checks import MAX_DISAGREEMENT
from fxprune.structure.groups import Group
from fxprune.structure.verify import failing_groups, sample_units, verify_removal
from fxprune.training.comparison import paired_drop
from fxprune.training.evaluate import Evaluation

MAX_REMOVAL_ERROR = 1e-5  # relative, single precision
CHECKED_UNITS_SHARE = 0.25  # of the units of every group that zero-then-remove tries
WEIGHT_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.INT8)
NOT_WANTED = "--no-onnx was given"
ACCURACY_LIMIT = 0.001  # ties may fall differently in another runtime


def check_data(data: Data, program: Program) -> None:
    """Fail unless the samples have the model's input shapes and labels among its classes.

    Raises:
        InputError: they do not; the message tells both sides.

    """
    check_inputs(data, program.example_inputs)
    output = next(node for node in program.graph.nodes if node.op == "output")
    values = pytree.tree_map_only(fx.Node, lambda node: node.meta.get("val"), output.args[0])
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(values)):
        return
    logits = logits_of(values)
    target = next(batches(data.calibration, 1)).target
    if not isinstance(target, Tensor) or target.is_floating_point() or logits.dim() < 2:
        return
    if logits.dim() == target.dim() + 1:
        check_labels(data, max(int(logits.shape[class_axis(logits)]), 2))


def sample_inputs(program: Program, data: Data, size: int = 16) -> tuple[tuple[Any, ...], ...]:
    """Return the inputs of one batch of samples, labelled or not; none if there are too few."""
    size = fixed_batch(program) or min(size, len(data.calibration))
    batch = next(batches(data.calibration, size, seed=0))
    return (batch.inputs,) if len(batch) == size else ()


def check_numbers(program: Program, calls: Sequence[tuple[Any, ...]]) -> None:
    """Fail if a program gives NaN, which no later check could judge.

    Raises:
        InputError: it does; the message names the first module whose output is NaN.

    """
    for inputs in calls:
        if (where := first_nan(program, inputs)) is not None:
            raise InputError(
                f"the model's outputs are not all numbers: NaN first appears in {where}; check the "
                "weights and the samples"
            )


def check_finite_outputs(
    dense: Program, small: Program, samples: Sequence[tuple[Any, ...]]
) -> Check:
    """Count outputs that are NaN or infinite though the dense model's are not."""
    wrong = 0
    for inputs in (dense.example_inputs, *samples):
        with torch.no_grad():
            expected, found = (_floats(one(*inputs)) for one in (dense, small))
        wrong += sum(
            int((left.isfinite() & ~right.isfinite()).sum())
            for left, right in zip(expected, found, strict=True)
        )
    return Check.of(wrong, 0, "values that are NaN or infinite, and finite in the dense model")


def _floats(outputs: Any) -> list[Tensor]:
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point() or leaf.is_complex()]


def check_removal(
    program: Program,
    groups: Sequence[Group],
    seed: int,
    samples: Sequence[tuple[Any, ...]] = (),
) -> tuple[Check, dict[Group, str]]:
    """Run zero-then-remove on random units of every removable group, on copies.

    A group fails only if removal differs in double precision too.

    Args:
        program: the dense program.
        groups: its groups.
        seed: chooses the units.
        samples: inputs to compare on besides the example inputs.

    Returns:
        The check, of the groups that can be removed; and what happens to the others.

    """
    chosen = sample_units(groups, CHECKED_UNITS_SHARE, seed)
    calls = [program, *(_on(program, inputs) for inputs in samples)]
    failing = _failing(calls, chosen)
    chosen = {group: units for group, units in chosen.items() if group not in failing}
    exact = {group: units for group, units in chosen.items() if not group.mixed_by}
    if not exact:
        why = (
            "a normalisation mixes the units of every group"
            if chosen
            else "there is no group with removable units"
        )
        return Check.skipped(why), failing
    error, limit = _removal_error(calls, exact)
    units = sum(map(len, exact.values()))
    note = f"{plural(units, 'random unit')} of {plural(len(exact), 'group')}"
    if mixed := len(chosen) - len(exact):
        note += f"; not checked for {mixed} whose units a normalisation mixes"
    if failing:
        note += f"; {plural(len(failing), 'group')} that cannot be removed keep their shapes"
    return Check.of(error, limit, note), failing


def _on(program: Program, inputs: tuple[Any, ...]) -> Program:
    """The same program with other example inputs."""
    other = program.copy(share=True)
    other.example_inputs = inputs
    other.refresh()
    return other


def _failing(calls: Sequence[Program], chosen: Mapping[Group, list[int]]) -> dict[Group, str]:
    """Find the groups whose removal is not exact, in double precision either."""
    found: dict[Group, str] = {}
    for program in calls:
        suspects = failing_groups(program, chosen, MAX_REMOVAL_ERROR)
        if suspects:
            double = in_double(program)
            units = {group: chosen[group] for group in suspects}
            found |= failing_groups(double, units, _exact_in_double(program, double))
    return found


def _removal_error(
    calls: Sequence[Program], units: Mapping[Group, list[int]]
) -> tuple[float, float]:
    """Return the largest error of a removal and its limit; in double precision where in doubt."""
    worst, limit = 0.0, MAX_REMOVAL_ERROR
    for program in calls:
        error = verify_removal(program, units).error or 0.0
        if not error <= MAX_REMOVAL_ERROR:
            double = in_double(program)
            limit = max(limit, _exact_in_double(program, double))
            error = verify_removal(double, units).error or 0.0
        worst = max(worst, error)
    return worst, limit


def _exact_in_double(program: Program, double: Program) -> float:
    """Return the limit in double precision.

    It grows where outputs are small beside what they are computed from: as single precision
    differs from double there, so does double from the truth, by 2**-29 of that.
    """
    with torch.no_grad(), FixedDraws(normal=0.5), state_kept(program), state_kept(double):
        noise = worst_error(double(*double.example_inputs), program(*program.example_inputs))
    return (
        max(MAX_REMOVAL_ERROR, 100 * noise * 2**-29) if math.isfinite(noise) else MAX_REMOVAL_ERROR
    )


def result_checks(
    export: ExportCheck,
    before: Evaluation,
    after: Evaluation,
    in_file: Evaluation,
    max_drop: float | None,
    accuracy_limit: float = ACCURACY_LIMIT,
    *,
    random: bool = False,
) -> dict[str, Check]:
    """Judge the emitted file: against PyTorch, and by the accuracy it may lose."""
    checks = {
        "onnx_parity": Check.skipped("it was not requested")
        if export.parity is None
        else Check.of(export.parity, export.limit, export.note)
    }
    if random:
        checks["onnx_accuracy"] = Check.skipped("the model draws random numbers")
    elif after.accuracy is None or in_file.accuracy is None:
        checks["onnx_accuracy"] = Check.skipped(after.note or "accuracy was not measured")
    else:
        limit = accuracy_limit + 1 / max(in_file.predictions, 1)
        apart = abs(after.accuracy - in_file.accuracy)
        checks["onnx_accuracy"] = Check.of(apart, limit, "ONNX Runtime compared with PyTorch")
    if max_drop is not None:
        checks["max_drop"] = check_drop(before, in_file, max_drop)
    return checks


def checks_without_file(
    reason: str, before: Evaluation, after: Evaluation, max_drop: float | None
) -> dict[str, Check]:
    """Judge a result that has no ONNX file, because none was wanted or none could be written."""
    checks = {
        name: Check.skipped("there is no ONNX file") for name in ("onnx_parity", "onnx_accuracy")
    }
    wanted = reason != NOT_WANTED
    checks["onnx_export"] = Check(True, False, note=reason) if wanted else Check.skipped(reason)
    if max_drop is not None:
        checks["max_drop"] = check_drop(before, after, max_drop)
    return checks


def accuracy_limit(checks: Mapping[str, Check]) -> float:
    """Return by how much accuracy on codes may differ between the runtimes: as predictions may."""
    agreement = checks.get("int8_agreement")
    return max(MAX_DISAGREEMENT, (agreement and agreement.limit) or 0.0)


def check_drop(before: Evaluation, after: Evaluation, limit: float) -> Check:
    """Compare the accuracy lost, in percentage points, with a limit.

    The upper end of the paired 90 % interval must be within it. Where at most half of the limit is
    lost and there are too few samples for an interval that narrow, the mean decides, and the note
    says how many samples would be needed.
    """
    if before.accuracy is None or after.accuracy is None:
        return Check(True, False, None, limit, "accuracy could not be measured")
    drop = paired_drop(before, after)
    if drop is None:
        return Check.of(100 * (before.accuracy - after.accuracy), limit, "points of accuracy lost")
    if drop.upper > limit and drop.points <= limit / 2:
        needed = drop.samples_needed(limit)
        return Check.of(drop.points, limit, f"{drop}; to be sure, {needed:,} would be needed")
    return Check.of(drop.upper, limit, str(drop))


def check_masks(program: Program, path: Path) -> Check:
    """Count the weights in an ONNX file that a mask says are zero and are not.

    Weights are found by name, or by value where the exporter transposed and renamed them.
    """
    masks = program.get(MASKS)
    stored = program.graph_module.state_dict()
    arrays = {
        item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy())
        for item in onnx.load(path).graph.initializer
        if item.data_type in WEIGHT_TYPES
    }
    wrong, missing = 0, []
    for name, keep in masks.keep.items():
        array = _in_file(name, stored.get(name), arrays)
        if array is None or array.shape != keep.shape:
            missing.append(name)
        else:
            wrong += int((array[~keep] != 0).sum())
    found = len(masks.keep) - len(missing)
    if not found:
        return Check.skipped("the file stores no masked weight as one tensor")
    note = f"{masks.pattern}: weights not zero in {found} masked tensors of the file"
    if missing:
        note += f"; not checked for {', '.join(missing[:3])}, not in it as one tensor"
    return Check.of(wrong, 0, note)


def _in_file(name: str, tensor: Tensor | None, arrays: Mapping[str, Tensor]) -> Tensor | None:
    """The initialiser that holds a tensor, the way round that the program has it."""
    if name in arrays or tensor is None:
        return arrays.get(name)
    tensor = tensor.detach().cpu()
    alike = [array for array in arrays.values() if array.dtype == tensor.dtype]
    both = [*alike, *(array.T for array in alike if array.dim() == 2)]
    return next((array for array in both if torch.equal(array, tensor)), None)
