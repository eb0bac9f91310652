"""A layer's problem with a look ahead: how far the next operations are from the dense ones.

    loss(W) = 1/2 sum over outputs k of  w_k * || f_k(W; X) - f_k(dense) ||^2 / samples

with ``w_k`` one over the mean square of the dense value, so that every operation counts alike. The
curvature is that of the loss (``newton``), or of its residuals alone (``gauss-newton``), which has
no negative directions. Either is linearised once at a point, and then only multiplied with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxprune.activations import Values
from fxprune.layers import argument, packet
from fxprune.newton import Product, Vector, total
from fxprune.program import Program
from fxprune.quiet import quiet
from fxprune.region import Region, affine_tail

aten = torch.ops.aten
Curvature = Literal["gauss-newton", "newton"]
Batch = tuple[Values, list[Tensor]]  # the frontier, and the dense values at the outputs
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Lookahead:
    """A region, the tensors in it that may change, and batches to see it on.

    Attributes:
        program: what the region is part of.
        region: what the loss looks at.
        names: the variables: the layer's weight, and what shifts its outputs.
        keep: by variable, which of its elements may change; None for all.
        batch: returns a batch by number.
        fixed: other tensors to compute the region with, by name.

    """

    program: Program
    region: Region
    names: tuple[str, ...]
    keep: tuple[Tensor | None, ...]
    batch: Callable[[int], Batch]
    fixed: Mapping[str, Tensor]

    @functools.cached_property
    def _aliases(self) -> dict[str, list[str]]:
        """By variable, all the names that its tensor is read under."""
        read = [str(node.target) for node in self.program.tensor_nodes()]
        tensor = self.program.tensor
        return {
            name: [other for other in read if tensor(other) is tensor(name)] for name in self.names
        }

    def point(self) -> Vector:
        """Return the variables as they are."""
        return tuple(self.program.tensor(name).detach() for name in self.names)

    def restrict(self, vector: Vector) -> Vector:
        """Return a vector without what may not change."""
        pairs = zip(vector, self.keep, strict=True)
        return tuple(part if keep is None else part * keep for part, keep in pairs)

    def residuals(self, batch: Batch) -> Callable[..., Vector]:
        """Return the weighed differences at the outputs as a function of the variables."""
        frontier, wanted = batch
        scales = [
            (0.5 / len(self.region.outputs) / value.square().mean().clamp_min(TINY)).sqrt()
            / value.numel() ** 0.5
            for value in wanted
        ]  # fmt: skip

        def differences(*point: Tensor) -> Vector:
            given = dict(self.fixed)
            for name, part in zip(self.names, point, strict=True):
                given |= dict.fromkeys(self._aliases[name], part)
            values = self.region.run(self.program, frontier, given)
            return tuple(
                (values[node] - value) * scale
                for node, value, scale in zip(self.region.outputs, wanted, scales, strict=True)
            )

        return differences

    def loss(self, numbers: Sequence[int], point: Vector) -> float:
        """Return the mean loss over batches."""
        losses = (_square(self.residuals(self.batch(n))(*point)) for n in numbers)
        return float(sum(float(loss) for loss in losses)) / len(numbers)

    def gradient(self, numbers: Sequence[int], point: Vector) -> Vector:
        """Return the gradient of the mean loss over batches."""
        parts = [self._gradient(self.residuals(self.batch(number)), point) for number in numbers]
        return self.restrict(tuple(part / len(numbers) for part in total(parts)))

    def _gradient(self, residuals: Callable[..., Vector], point: Vector) -> Vector:
        leaves = tuple(part.detach().requires_grad_() for part in point)
        with torch.enable_grad():
            loss = _square(residuals(*leaves))
        return torch.autograd.grad(loss, leaves)

    def product(self, number: int, point: Vector, curvature: Curvature) -> Product:
        """Return the multiplication by the curvature on one batch, linearised at a point."""
        residuals = self.residuals(self.batch(number))
        if curvature == "newton":
            slope = torch.func.grad(lambda *p: _square(residuals(*p)), tuple(range(len(point))))
            with quiet():
                _, multiply = torch.func.linearize(slope, *point)
            return lambda vector: self.restrict(multiply(*vector))
        with quiet():
            _, forward = torch.func.linearize(residuals, *point)
        backward: Any = torch.func.vjp(residuals, *point)[1]

        def square(vector: Vector) -> Vector:
            image = forward(*vector)
            found: Vector = backward(tuple(2 * part for part in image))
            return self.restrict(found)

        return square


def _square(differences: Vector) -> Tensor:
    return torch.stack([part.square().sum() for part in differences]).sum()


def variables(program: Program, region: Region) -> tuple[str, ...]:
    """Return the tensors that a look ahead changes: the weight, and what shifts the outputs."""
    layer = region.layer
    if layer.bias is not None:
        return layer.weight, layer.bias
    found = []
    for call in layer.calls:
        tail = affine_tail(call)
        if len(tail) < 2 or packet(tail[1]) is not aten.batch_norm:
            return (layer.weight,)
        shift: Any = argument(tail[1], "bias")
        if not isinstance(shift, fx.Node) or len(shift.users) > 1:
            return (layer.weight,)
        found.append(str(shift.target))
    return layer.weight, *dict.fromkeys(found)
