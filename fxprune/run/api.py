"""What Python users call besides ``compile``: evaluate, inspect and bench, each in one call."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from torch import nn

from fxprune.calibration.outputs import logits_of
from fxprune.calibration.running import fixed_batch
from fxprune.data import sources
from fxprune.data.batches import batches
from fxprune.data.roles import as_data
from fxprune.errors import InputError
from fxprune.graph import cost as cost_module
from fxprune.graph import serialize
from fxprune.graph.facts import Preference
from fxprune.graph.program import Program
from fxprune.graph.trace import trace
from fxprune.models import loading
from fxprune.onnx import export
from fxprune.onnx.benchmark import CPU, Latency, compare, parse_shapes
from fxprune.report.inspection import Inspection
from fxprune.report.inspection import inspect as inspect_program
from fxprune.run.arguments import checked
from fxprune.structure import groups, removal, verify
from fxprune.training.evaluate import Evaluation, run_onnx
from fxprune.training.evaluate import evaluate as evaluate_run

cost = checked(cost_module.cost)
export_onnx = checked(export.export_onnx)
find_groups = checked(groups.find_groups)
load_data = checked(sources.load_data)
load_model = checked(loading.load_model)
remove_units = checked(removal.remove_units)
save = checked(serialize.save)
verify_removal = checked(verify.verify_removal)


@checked
def evaluate(
    model: nn.Module | Program | str | Path,
    data: Any,
    *,
    batch_size: int = 128,
    device: str = "cpu",
    threads: int | None = None,
) -> Evaluation:
    """Measure top-1 accuracy on the evaluation part of the data.

    Args:
        model: a module or a program, which is moved to the device, or the path of an ONNX file,
            which runs in ONNX Runtime.
        data: what ``compile`` takes; its ``eval`` samples are used, with labels.
        batch_size: samples per step.
        device: where PyTorch runs, such as ``cuda``.
        threads: of ONNX Runtime; None leaves the number to it.

    Raises:
        InputError: there is no evaluation data, or no such file.

    """
    samples = as_data(data).eval
    if samples is None:
        raise InputError("fxprune.evaluate: the data has no 'eval' samples to measure accuracy on")
    if isinstance(model, (str, Path)):
        fixed = _batch_of(Path(model))
        run = run_onnx(Path(model), threads=threads)
        return evaluate_run(run, samples, batch_size=batch_size, fixed_batch=fixed)
    fixed = fixed_batch(model) if isinstance(model, Program) else None
    training = isinstance(model, nn.Module) and model.training
    model.to(device).eval()
    try:
        return evaluate_run(
            lambda inputs: logits_of(model(*inputs)),
            samples,
            batch_size=batch_size,
            fixed_batch=fixed,
            device=device,
        )
    finally:
        if isinstance(model, nn.Module):
            model.train(training)


def _batch_of(path: Path) -> int | None:
    """Return the only batch size that an ONNX file takes; None if it is dynamic."""
    if not path.is_file():
        raise InputError(f"fxprune.evaluate: there is no file {path}; name an ONNX model")
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError as error:
        raise InputError(f"fxprune.evaluate: {path} is not an ONNX model ({error})") from error
    dimensions = graph.input[0].type.tensor_type.shape.dim if graph.input else ()
    return int(dimensions[0].dim_value) or None if dimensions else None


@checked
def inspect(
    model: nn.Module | Program,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    data: Any = None,
    attention: Preference = "heads",
) -> Inspection:
    """Find the groups of units of a model, what each costs, and which are frozen and why.

    Args:
        model: a module, or a program traced from one.
        example_inputs: inputs that run the module; by default one sample of the data.
        data: what ``compile`` takes.
        attention: remove whole heads, or narrow every head.

    Raises:
        InputError: there is nothing to trace the module with, or it cannot be traced.

    """
    return inspect_program(as_program(model, example_inputs, data), attention)


def as_program(
    model: nn.Module | Program, example_inputs: tuple[Any, ...] | None, data: Any
) -> Program:
    """Trace a module with its example inputs or a sample of the data; a program stays itself."""
    if isinstance(model, Program):
        return model
    if example_inputs is None:
        if data is None:
            raise InputError("cannot infer the input shape; pass example_inputs or data")
        example_inputs = next(batches(as_data(data).calibration, 1)).inputs
    return trace(model, example_inputs)


@checked
def bench(
    models: str | Path | Iterable[str | Path],
    *,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 5.0,
    provider: str = CPU,
    latency_shape: str | Iterable[str] = (),
) -> dict[str, Latency]:
    """Time ONNX files in ONNX Runtime, in turns, on random inputs.

    Args:
        models: paths of ONNX files; speed-ups are over the first.
        batch: the size of dynamic dimensions.
        threads: of one operator in ONNX Runtime.
        seconds: how long to measure.
        provider: the execution provider; each latency names the one that ran.
        latency_shape: shapes of inputs, such as ``input_ids=1x26``, or a list of such texts.

    Returns:
        By path, latencies in milliseconds.

    Raises:
        InputError: there is no such file, or it is not an ONNX model.

    """
    paths = [models] if isinstance(models, (str, Path)) else list(models)
    texts = [latency_shape] if isinstance(latency_shape, str) else latency_shape
    return compare(
        {str(path): Path(path) for path in paths}, batch=batch, threads=threads, seconds=seconds,
        provider=provider, shapes=parse_shapes(texts),
    )  # fmt: skip
