"""Which layers' rounding costs most: the second-order rise of the loss by each alone.

A layer's rounded weight and input move its output ``z`` by ``d``. Around a trained model the loss
rises by ``d' H d / 2``; for the Gauss-Newton ``H`` of cross-entropy that is the mean of
``(g' d)^2 / 2`` over samples, with ``g`` the gradient for a label drawn from the model's own
predictions. One walk forwards and one back give all layers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxprune.calibration.outputs import class_axis, logits_of
from fxprune.calibration.running import fixed_batch, placed
from fxprune.data.batches import batches
from fxprune.graph.custom_ops import FAKE_QUANTIZE
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.quantization.patterns import origin
from fxprune.sensitivity.model import kind_of


def rounding_costs(
    program: Program, context: Context, samples: int, batch_size: int
) -> dict[str, float]:
    """Return by weight the rise of the loss that rounding in its layer brings, dearest first.

    Where the loss is not cross-entropy, it is the squared error of the output that rises.
    """
    size = fixed_batch(program) or batch_size
    count = max(min(samples, len(context.samples.calibration)) // size, 1) * size
    totals: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(context.seed)
    program.eval()
    with placed(program, context.device), torch.enable_grad():
        for batch in batches(
            context.samples.calibration, size, seed=context.seed, limit=count, device=context.device
        ):
            walker = _Walker(program)
            score = _drawn_loss(logits_of(walker.run(*batch.inputs)), context, generator)
            outputs = [output for output, _ in walker.shifts.values()]
            gradients = torch.autograd.grad(score, outputs, allow_unused=True)
            for name, gradient in zip(walker.shifts, gradients, strict=True):
                if gradient is not None:
                    along = (gradient * walker.shifts[name][1]).flatten(1).sum(1)
                    rise = along.double().square().sum() / 2 / count
                    totals[name] = totals.get(name, torch.zeros_like(rise)) + rise
    costs = {name: float(total) for name, total in totals.items()}
    return dict(sorted(costs.items(), key=lambda item: -item[1]))


def to_recover(costs: Mapping[str, float], points: float, gap: float) -> tuple[str, ...]:
    """Name the fewest layers whose rounding explains so many points of a gap.

    Points are taken to fall away in proportion to the costs; all layers where the gap is smaller.

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
    """Return in how many of a hundred calibration samples rounding changes the prediction."""
    size = fixed_batch(program) or batch_size
    count = max(min(samples, len(context.samples.calibration)) // size, 1) * size
    program.eval()
    changed = []
    with placed(program, context.device), torch.no_grad():
        for batch in batches(
            context.samples.calibration, size, seed=context.seed, limit=count, device=context.device
        ):
            rounded, exact = (
                logits_of(found)
                for found in (program(*batch.inputs), _Walker(program).run(*batch.inputs))
            )
            axis = class_axis(exact)
            changed.append((rounded.argmax(axis) != exact.argmax(axis)).flatten())
    return 100 * float(torch.cat(changed).double().mean())


def _drawn_loss(logits: Tensor, context: Context, generator: torch.Generator) -> Tensor:
    """A sum over samples whose gradients have the curvature of the loss as their second moment."""
    if kind_of(context.loss) != "cross-entropy":
        signs = torch.randint(0, 2, logits.shape, generator=generator).to(logits) * 2 - 1
        return (2**0.5 * signs * logits).sum()
    rows = logits.movedim(class_axis(logits), -1).flatten(0, -2)
    drawn = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=generator)
    return F.cross_entropy(rows, drawn.flatten().to(rows.device), reduction="sum")


class _Walker(fx.Interpreter):
    """Runs a program without rounding; keeps every layer's output, and how rounding moves it."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self._program = program
        self.shifts: dict[str, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is FAKE_QUANTIZE:
            return self.fetch_args_kwargs_from_env(n)[0][0]
        value = super().run_node(n)
        weight = n.args[1] if len(n.args) > 1 else None
        if isinstance(weight, fx.Node) and weight.target is FAKE_QUANTIZE:
            value = value if value.requires_grad else value.requires_grad_()
            self.shifts[_stored(weight)] = value, self._shift(n, value)
        return value

    def _shift(self, layer: fx.Node, value: Tensor) -> Tensor:
        args, kwargs = self.fetch_args_kwargs_from_env(layer)
        with torch.no_grad():
            rounded = [
                self._rounded(origin(cast(fx.Node, node)), tensor)
                for node, tensor in zip(layer.args[:2], args[:2], strict=True)
            ]
            moved: Tensor = layer.target(*rounded, *args[2:], **kwargs)  # type: ignore[operator]
            return moved - value

    def _rounded(self, fake: fx.Node, value: Tensor) -> Tensor:
        if fake.target is not FAKE_QUANTIZE:
            return value
        scale, zero = (self._program.tensor(str(x.target)) for x in fake.args[1:3])  # type: ignore[union-attr]
        rounded: Tensor = FAKE_QUANTIZE(value, scale, zero, *fake.args[3:])
        return rounded


def _stored(fake: fx.Node) -> str:
    source = fake.args[0]
    assert isinstance(source, fx.Node)
    return str(source.target)
