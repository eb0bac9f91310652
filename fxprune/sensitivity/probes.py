"""Stochastic traces of curvature blocks, all units at once.

Two ways of probing, with the same expectation where both apply:

- *weights*: random signs ``v`` on the weights; ``v_u' (H v)_u`` over a unit's elements has the
  expectation ``Tr(H_uu)`` (Hutchinson). One Hessian-vector product per probe; the graph of the
  gradient is built once per batch and used by every probe. The Gauss-Newton matrix ``J' A J`` is
  multiplied from right to left, also by reverse differentiation alone.
- *outputs*: random signs ``e`` on the outputs, through a root of the loss's curvature ``A = L L'``;
  the squares of ``J' L e`` have the diagonal of ``J' A J`` as expectation. One vector-Jacobian
  product per probe, nothing negative, and no noise from off-diagonal blocks.

A network that is piecewise linear in each of its weights (convolutions, linear layers, ReLU,
pooling, batch norm in evaluation) has the same diagonal in both matrices: the second derivative of
the outputs in any one weight is zero. There the exact Hessian trace comes from output probes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxprune.data.batches import Batch
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program
from fxprune.sensitivity.model import Objective, Precision, Weights, explained, single_tensor
from fxprune.sensitivity.units import UnitLayout

aten = torch.ops.aten
Signs = Callable[[Tensor], Tensor]  # random signs in the shape of a tensor
Probe = Callable[[Signs], Tensor]  # one sample of every unit's trace
Matrix = Literal["hessian", "gauss-newton"]


def piecewise_linear(program: Program) -> bool:
    """Whether the outputs are piecewise linear in every single weight, the others held fixed."""
    seen = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            tensor = program.tensor(str(node.target))
            if len(node.users) > 1 or id(tensor) in seen:
                return False  # a shared weight is multiplied with itself
            seen.add(id(tensor))
        elif node.op == "call_function" and isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            known = operator_of(node)
            if not known.piecewise_linear and node.target is not operator.getitem:
                return False
            if (known.is_layer or known.kind == "product") and _weight_of_data(node):
                return False
    return True


def _weight_of_data(node: fx.Node) -> bool:
    """Whether a product has a computed weight, so that it may be of second degree."""
    weight = node.args[2] if node.target is aten.addmm.default else node.args[1]
    return not (isinstance(weight, fx.Node) and _constant(weight))


def _constant(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return False
    return node.op == "get_attr" or all(map(_constant, node.all_input_nodes))


@dataclass(frozen=True, eq=False)
class TraceProbes:
    """Makes probes of one matrix for one batch after another.

    Attributes:
        program: the program in evaluation mode, on its device.
        layout: the units.
        weights: leaves for every weight that dies with some unit.
        objective: the loss and its labels.
        matrix: exact Hessian or Gauss-Newton.
        outputs: probe the outputs rather than the weights.
        precision: of the model; sums are in single precision at least.
        scale: factor on the loss against underflow in half precision.

    """

    program: Program
    layout: UnitLayout
    weights: Weights
    objective: Objective
    matrix: Matrix
    outputs: bool
    precision: Precision = "fp32"
    scale: float = 1.0

    def prepare(self, batch: Batch, generator: torch.Generator) -> Probe:
        """Run the model on a batch and return what makes samples from it."""
        made = self.weights.outputs(self.program, batch, self.precision)
        target = self.objective.target(made, batch.target, generator)
        if self.outputs:
            return self._output_probe(made, target)
        with explained(f"the {self.matrix} trace by weight probes"), torch.enable_grad():
            if self.matrix == "hessian":
                return self._hessian_probe(made, target)
            return self._gauss_newton_probe(made, target)

    def _hessian_probe(self, made: Any, target: Any) -> Probe:
        leaves = self.leaves()
        loss = self.objective(made, target) * self.scale
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)

        def sample(signs: Signs) -> Tensor:
            vectors = [signs(leaf) for leaf in leaves]
            products = _product(gradients, leaves, vectors)
            return self.collect([v * h for v, h in zip(vectors, products, strict=True)], self.scale)

        return sample

    def _gauss_newton_probe(self, made: Any, target: Any) -> Probe:
        leaves = self.leaves()
        flat = _floating(made)
        loss = self.objective(made, target) * self.scale
        slopes = torch.autograd.grad(loss, flat, create_graph=True, materialize_grads=True)
        # J'u is linear in u, so differentiating it in u along v gives J v.
        dummies = [torch.zeros_like(leaf, requires_grad=True) for leaf in flat]
        pulled = torch.autograd.grad(
            flat, leaves, dummies, create_graph=True, materialize_grads=True
        )

        def sample(signs: Signs) -> Tensor:
            vectors = [signs(leaf) for leaf in leaves]
            pushed = _product(pulled, dummies, vectors)
            bent = _product(slopes, flat, pushed)
            back = torch.autograd.grad(
                flat, leaves, bent, retain_graph=True, materialize_grads=True
            )
            return self.collect([v * b for v, b in zip(vectors, back, strict=True)], self.scale)

        return sample

    def _output_probe(self, made: Any, target: Any) -> Probe:
        leaves, outputs = self.leaves(), single_tensor(made)
        assert outputs is not None, "output probes are chosen only where there is one output"

        wide = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))

        def sample(signs: Signs) -> Tensor:
            root = self.objective.root(outputs, target, signs(wide))
            gradients = torch.autograd.grad(
                outputs, leaves, (root * self.scale).to(outputs.dtype),
                retain_graph=True, materialize_grads=True,
            )  # fmt: skip
            return self.collect([gradient.square() for gradient in gradients], self.scale**2)

        return sample

    def leaves(self) -> list[Tensor]:
        """Return the leaves, each once, though several names may share one."""
        return list({id(leaf): leaf for leaf in self.weights.leaves.values()}.values())

    def collect(self, products: Sequence[Tensor], scale: float) -> Tensor:
        """Sum elementwise products over each unit, the loss scale divided out."""
        by_leaf = {
            id(leaf): product / scale for leaf, product in zip(self.leaves(), products, strict=True)
        }
        return self.layout.sums(
            {name: by_leaf[id(leaf)] for name, leaf in self.weights.leaves.items()}
        )


def _product(
    functions: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Multiply the transposed Jacobian of ``functions`` in ``inputs`` by vectors."""
    pairs = [
        (function, vector)
        for function, vector in zip(functions, vectors, strict=True)
        if function.requires_grad
    ]
    if not pairs:
        return tuple(torch.zeros_like(value) for value in inputs)
    tensors, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(
        tensors, inputs, cotangents, retain_graph=True, materialize_grads=True
    )


def _floating(outputs: Any) -> list[Tensor]:
    return [
        leaf
        for leaf in torch.utils._pytree.tree_leaves(outputs)
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
