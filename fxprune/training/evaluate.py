"""Accuracy of a program, or of an ONNX file in ONNX Runtime, over a whole data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.calibration.outputs import class_axis, logits_of
from fxprune.data.batches import batches
from fxprune.data.datasets import Samples
from fxprune.graph.program import Program
from fxprune.pipeline.progress import Tracker

Run = Callable[[tuple[Any, ...]], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """How often the predictions are right.

    Attributes:
        accuracy: the share of right predictions, from 0 to 1; None if the task has no classes.
        predictions: how many were judged: samples, or pixels or tokens where each has a class.
        note: what the accuracy is measured against, if not labels, or why there is none.
        hits: for each prediction in the order of the samples, whether it is right.

    """

    accuracy: float | None
    predictions: int = 0
    note: str | None = None
    hits: Tensor | None = field(default=None, repr=False, compare=False)


def evaluate(
    run: Run,
    samples: Samples,
    *,
    batch_size: int = 128,
    reference: Run | None = None,
    fixed_batch: int | None = None,
    device: str = "cpu",
    progress: Tracker | None = None,
    text: str = "evaluating",
) -> Evaluation:
    """Measure top-1 accuracy.

    Args:
        run: gives the logits for a batch's inputs; see ``run_program`` and ``run_onnx``.
        samples: what to measure on, all of it.
        batch_size: samples per step.
        reference: where samples have no labels, its predictions stand for them.
        fixed_batch: the only batch size that ``run`` takes; the last batch is filled up.
        device: where the batches go.
        progress: shows how far it is.
        text: what the progress line says.

    """
    size = fixed_batch or batch_size
    steps = batches(samples, size, device=device)
    hits: list[Tensor] = []
    agreement = False
    tracker = progress or Tracker()
    for batch in tracker.track(steps, text, total=-(-len(samples) // size)):
        inputs, count = _filled(batch.inputs, len(batch), fixed_batch)
        with torch.no_grad():
            logits = run(inputs)[:count]
            target = batch.target
            if target is None and reference is not None:
                agreement, expected = True, reference(inputs)[:count]
                target = classes(expected)
        if target is None:
            return Evaluation(None, 0, "the samples have no labels")
        predicted = predict(logits, target)
        if predicted is None:
            return Evaluation(None, 0, "the targets are not classes, so there is no accuracy")
        counted = target >= 0  # -100 marks tokens and pixels to leave out
        hits.append((predicted == target)[counted].cpu())
    note = (
        "the data has no labels: accuracy is the agreement with the dense model"
        if agreement
        else None
    )
    right = torch.cat(hits) if hits else torch.empty(0, dtype=torch.bool)
    share = float(right.double().mean()) if len(right) else None
    return Evaluation(share, len(right), note, right)


def _filled(inputs: tuple[Any, ...], count: int, wanted: int | None) -> tuple[tuple[Any, ...], int]:
    """Repeat the last sample until a batch has the size that the program is fixed to."""
    if wanted is None or count == wanted:
        return inputs, count
    index = torch.arange(wanted).clamp(max=count - 1)
    filled = pytree.tree_map_only(
        Tensor, lambda tensor: tensor[index.to(tensor.device)] if tensor.dim() else tensor, inputs
    )
    return filled, count


def predict(logits: Tensor, target: Tensor) -> Tensor | None:
    """Return the predicted classes, shaped like the target; None if these are not classes."""
    if target.is_floating_point() or target.is_complex():
        return None
    if logits.dim() == target.dim() + 1 and logits.shape[class_axis(logits, target)] > 1:
        predicted = _classes(logits, class_axis(logits, target))
    elif logits.numel() == target.numel():  # one logit per sample: two classes
        predicted = (logits.reshape(target.shape) > 0).long()
    else:
        return None
    return predicted if predicted.shape == target.shape else None


def classes(logits: Tensor) -> Tensor:
    """Return the predicted classes where no targets show which axis holds them."""
    return _classes(logits, class_axis(logits))


def _classes(logits: Tensor, axis: int) -> Tensor:
    """The largest logit's class; -1, which is never right, where a logit is NaN."""
    return logits.argmax(axis).masked_fill(logits.isnan().any(axis), -1)


def run_program(program: Program) -> Run:
    """Run a program in evaluation mode."""
    program.eval()
    return lambda inputs: logits_of(program(*inputs))


def run_onnx(path: Path, *, threads: int | None = None, fused: bool = True) -> Run:
    """Run an ONNX file in ONNX Runtime on the CPU.

    Args:
        path: the file.
        threads: of ONNX Runtime; None leaves the number to it.
        fused: let it optimise the graph; without that, every node of the file runs as it stands.

    """
    import onnxruntime as ort  # slow to import, and only this needs it

    from fxprune.onnx.runtime import feeds

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = [slot.name for slot in session.get_outputs()]
    wanted = ["logits" if "logits" in outputs else outputs[0]]

    def run(inputs: tuple[Any, ...]) -> Tensor:
        return torch.from_numpy(session.run(wanted, feeds(session, inputs))[0])

    return run
