"""A layer's loss with lookahead: how far the values of the next operations are from the dense ones.

    loss(W) = 1/2 sum over outputs k of  w_k * || f_k(W; X) - f_k(dense) ||^2 / samples

with ``w_k`` one over the mean square of the dense value, so that every operation has equal weight.
The curvature is that of the loss (``newton``), or of its residuals alone (``gauss-newton``), which
has no negative directions. It is linearised once at a point; vectors are then multiplied by it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxprune.graph.node_args import argument, packet_of
from fxprune.graph.program import Program
from fxprune.reconstruction.incremental_run import Values
from fxprune.reconstruction.newton import Product, Vector, along
from fxprune.reconstruction.region import Region, affine_tail

aten = torch.ops.aten
Curvature = Literal["gauss-newton", "newton"]
Solver = Literal["own", "paper"]
Batch = tuple[Values, list[Tensor]]  # the frontier, and the dense values at the outputs
MIN_MEAN_SQUARE = 1e-12  # of a dense value


@dataclass(frozen=True, eq=False)
class Lookahead:
    """A region, the tensors in it that may change, and batches of data.

    Attributes:
        program: the program that the region is part of.
        region: the operations whose values the loss compares.
        names: the variables: the layer's weight, and the bias that shifts its outputs.
        keep: by variable, which of its elements may change; None for all.
        batch: returns a batch by number.
        fixed: tensors to use instead of other stored ones, by name.
        weighted: whether every operation has equal weight; if not, every ``w_k`` is two.

    """

    program: Program
    region: Region
    names: tuple[str, ...]
    keep: tuple[Tensor | None, ...]
    batch: Callable[[int], Batch]
    fixed: Mapping[str, Tensor]
    weighted: bool = True

    @functools.cached_property
    def _aliases(self) -> dict[str, list[str]]:
        """By variable, all names that its tensor has."""
        read = [str(node.target) for node in self.program.tensor_nodes()]
        tensor = self.program.tensor
        return {
            name: [other for other in read if tensor(other) is tensor(name)] for name in self.names
        }

    def point(self) -> Vector:
        """Return the current variables."""
        return tuple(self.program.tensor(name).detach() for name in self.names)

    def restrict(self, vector: Vector) -> Vector:
        """Return a vector with zeros for the elements that may not change."""
        pairs = zip(vector, self.keep, strict=True)
        return tuple(part if keep is None else part * keep for part, keep in pairs)

    def residuals(self, batch: Batch) -> Callable[..., Vector]:
        """Return the function from the variables to the weighted differences at the outputs."""
        frontier, targets = batch
        wanted = [_real(value) for value in targets]
        scales = self._scales(wanted)

        def differences(*point: Tensor) -> Vector:
            given = dict(self.fixed)
            for name, part in zip(self.names, point, strict=True):
                given |= dict.fromkeys(self._aliases[name], part)
            values = self.region.run(self.program, frontier, given)
            return tuple(
                (_real(values[node]) - value) * scale
                for node, value, scale in zip(self.region.outputs, wanted, scales, strict=True)
            )

        return differences

    def _scales(self, wanted: list[Tensor]) -> list[Tensor]:
        """The factor of the differences at each output."""
        if not self.weighted:
            return [wanted[0].new_tensor(len(wanted[0]) ** -0.5)] * len(wanted)
        return [
            (0.5 / len(wanted) / value.square().mean().clamp_min(MIN_MEAN_SQUARE)).sqrt()
            / value.numel() ** 0.5
            for value in wanted
        ]  # fmt: skip

    def loss(self, numbers: Sequence[int], point: Vector) -> float:
        """Return the mean loss over batches."""
        losses = (_square(self.residuals(self.batch(n))(*point)) for n in numbers)
        return float(sum(float(loss) for loss in losses)) / len(numbers)

    def gradient(self, numbers: Sequence[int], point: Vector) -> Vector:
        """Return the gradient of the mean loss over batches."""
        found = tuple(torch.zeros_like(part) for part in point)
        leaves = tuple(part.detach().requires_grad_() for part in point)
        for number in numbers:
            with torch.enable_grad():
                loss = _square(self.residuals(self.batch(number))(*leaves))
            if loss.requires_grad:
                found = along(found, 1 / len(numbers), torch.autograd.grad(loss, leaves))
        return self.restrict(found)

    def product(self, number: int, point: Vector, curvature: Curvature) -> Product:
        """Return the product with the curvature of one batch, linearised at a point."""
        leaves = tuple(part.detach().requires_grad_() for part in point)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
            every = self.residuals(self.batch(number))(*leaves)
            differences = tuple(part for part in every if part.requires_grad)
            if not differences:  # no output depends on the weights
                return lambda vector: tuple(map(torch.zeros_like, vector))
            if curvature == "newton":  # the second derivative of the loss
                slopes = torch.autograd.grad(_square(differences), leaves, create_graph=True)
                found: Product = functools.partial(_pull, slopes, leaves)
            else:
                found = _gauss_newton(differences, leaves)
        return lambda vector: self.restrict(found(vector))


def _gauss_newton(differences: Vector, leaves: Vector) -> Product:
    """Return the product with ``2 J' J``; ``J v`` is the derivative by ``u`` of ``u' J v``."""
    probes = tuple(torch.zeros_like(part, requires_grad=True) for part in differences)
    pulled = torch.autograd.grad(differences, leaves, probes, create_graph=True)

    def multiply(vector: Vector) -> Vector:
        image = _pull(pulled, probes, vector)
        return _pull(differences, leaves, tuple(2 * part for part in image))

    return multiply


def _pull(values: Vector, inputs: Vector, vector: Vector) -> Vector:
    """Multiply by the transposed derivative of values by inputs; keep their graph."""
    return torch.autograd.grad(
        values, inputs, vector, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def _real(value: Tensor) -> Tensor:
    """A complex value as its real and imaginary parts, in a last dimension of two."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def _square(differences: Vector) -> Tensor:
    return torch.stack([part.square().sum() for part in differences]).sum()


def variables(program: Program, region: Region) -> tuple[str, ...]:
    """Return the tensors that lookahead changes: the weight, and the bias that shifts outputs."""
    layer = region.layer
    if layer.bias is not None:
        return layer.weight, layer.bias
    found = []
    for call in layer.calls:
        tail = affine_tail(call)
        if len(tail) < 2 or packet_of(tail[1]) is not aten.batch_norm:
            return (layer.weight,)
        shift: Any = argument(tail[1], "bias")
        if not isinstance(shift, fx.Node) or len(shift.users) > 1:
            return (layer.weight,)
        found.append(str(shift.target))
    return layer.weight, *dict.fromkeys(found)
