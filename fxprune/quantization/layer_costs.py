"""The rise in loss that rounding in each layer alone causes, to second order.

Rounding a layer's weight and input changes its output ``z`` by ``d``. Around a trained model the
loss rises by ``d' H d / 2``. With the Gauss-Newton ``H`` of cross-entropy this is the mean of
``(g' d)^2 / 2`` over samples, where ``g`` is the gradient for a label drawn from the model's own
predictions. One forward and one backward pass cover all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxprune.calibration.outputs import class_axis, logits_of
from fxprune.calibration.running import placed
from fxprune.calibration.stream import calibration_stream
from fxprune.graph.custom_ops import FAKE_QUANTIZE
from fxprune.graph.hooks import Call, Hook, run_with_hooks
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.quantization.fake_quantizers import unrounding
from fxprune.quantization.patterns import origin
from fxprune.sensitivity.model import kind_of


def rounding_costs(
    program: Program, context: Context, samples: int, batch_size: int
) -> dict[str, float]:
    """Return by weight the rise in loss that rounding in its layer causes, largest first.

    If the loss is not cross-entropy, the squared error of the output is used.
    """
    stream = calibration_stream(program, context, samples, batch_size, remainder="drop")
    totals: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(context.seed)
    program.eval()
    with placed(program, context.device), torch.enable_grad():
        for batch in stream:
            shifts: dict[str, tuple[Tensor, Tensor]] = {}
            made = run_with_hooks(program, batch.inputs, _unrounded(program, shifts))
            score = _drawn_loss(logits_of(made), context, generator)
            outputs = [output for output, _ in shifts.values()]
            gradients = torch.autograd.grad(score, outputs, allow_unused=True)
            for name, gradient in zip(shifts, gradients, strict=True):
                if gradient is not None:
                    along = (gradient * shifts[name][1]).flatten(1).sum(1)
                    rise = along.double().square().sum() / 2 / stream.total
                    totals[name] = totals.get(name, torch.zeros_like(rise)) + rise
    costs = {name: float(total) for name, total in totals.items()}
    return dict(sorted(costs.items(), key=lambda item: -item[1]))


def to_recover(costs: Mapping[str, float], points: float, gap: float) -> tuple[str, ...]:
    """Return the fewest layers whose rounding explains so many percentage points of a gap.

    Points are assumed to be proportional to the costs; if the gap is smaller, all layers.

    >>> to_recover({"head": 3.0, "stem": 1.0, "body": 0.1}, 0.5, 0.6)
    ('head', 'stem')
    """
    wanted = min(points / gap, 1.0) * sum(costs.values()) if gap > 0 else 0.0
    found, explained = [], 0.0
    for name, value in sorted(costs.items(), key=lambda item: -item[1]):
        if explained >= wanted:
            break
        found.append(name)
        explained += value
    return tuple(found)


def disagreement(program: Program, context: Context, samples: int, batch_size: int) -> float:
    """Return the percentage of calibration samples whose prediction rounding changes."""
    stream = calibration_stream(program, context, samples, batch_size, remainder="drop")
    unrounded = unrounding(program)
    program.eval()
    changed = []
    with placed(program, context.device), torch.no_grad():
        for batch in stream:
            rounded = logits_of(program(*batch.inputs))
            exact = logits_of(run_with_hooks(program, batch.inputs, unrounded))
            axis = class_axis(exact)
            changed.append((rounded.argmax(axis) != exact.argmax(axis)).flatten())
    return 100 * float(torch.cat(changed).double().mean())


def _drawn_loss(logits: Tensor, context: Context, generator: torch.Generator) -> Tensor:
    """A sum over samples whose gradients have the curvature of the loss as second moment."""
    if kind_of(context.loss) != "cross-entropy":
        signs = torch.randint(0, 2, logits.shape, generator=generator).to(logits) * 2 - 1
        return (2**0.5 * signs * logits).sum()
    rows = logits.movedim(class_axis(logits), -1).flatten(0, -2)
    drawn = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=generator)
    return F.cross_entropy(rows, drawn.flatten().to(rows.device), reduction="sum")


def _unrounded(program: Program, shifts: dict[str, tuple[Tensor, Tensor]]) -> dict[fx.Node, Hook]:
    """Hooks that skip rounding, and record every layer's output and its change by rounding."""
    weights = {
        node: weight
        for node in program.graph.nodes
        if len(node.args) > 1
        and isinstance(weight := node.args[1], fx.Node)
        and weight.target is FAKE_QUANTIZE
        and weight.args[5] != -1  # else it is a second activation
    }

    def keep(call: Call) -> Tensor:
        value: Tensor = call.value()
        value = value if value.requires_grad else value.requires_grad_()
        name = str(cast(fx.Node, weights[call.node].args[0]).target)
        shifts[name] = value, _shift(program, call, value)
        return value

    return unrounding(program) | dict.fromkeys(weights, keep)


def _shift(program: Program, call: Call, value: Tensor) -> Tensor:
    """The change of a layer's output by rounding its input and weight."""
    with torch.no_grad():
        rounded = [
            _rounded(program, origin(cast(fx.Node, node)), tensor)
            for node, tensor in zip(call.node.args[:2], call.args[:2], strict=True)
        ]
        moved: Tensor = call.value(*rounded, *call.args[2:])
        return moved - value


def _rounded(program: Program, fake: fx.Node, value: Tensor) -> Tensor:
    if fake.target is not FAKE_QUANTIZE:
        return value
    scale, zero = (program.tensor(str(x.target)) for x in fake.args[1:3])  # type: ignore[union-attr]
    rounded: Tensor = FAKE_QUANTIZE(value, scale, zero, *fake.args[3:])
    return rounded
