"""Derivatives of the loss and of the outputs in every unit's gate, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.data.batches import Batch
from fxprune.sensitivity.gates import GatedProgram
from fxprune.sensitivity.model import Objective, Precision, differentiable, single_tensor

MOST_EXACT, FEW = 16, 4
GateCriterion = Literal["taylor", "fisher", "gauss-newton", "output-shift"]


@dataclass(frozen=True, eq=False)
class GateProbes:
    """Scores each sample's removal of each unit to first or second order.

    Attributes:
        gated: the program with gates.
        objective: the loss and its labels.
        criterion: ``taylor`` |g|, ``fisher`` g^2 / 2, ``gauss-newton`` j' A j / 2 or
            ``output-shift`` j' j over the number of outputs, where g is the derivative of a
            sample's loss in the gate, j that of its outputs, A the curvature of the loss in them.
        precision: of the model.
        probes: random vectors on the outputs for the last two; where a sample has no more outputs
            than this, unit vectors instead, which give the exact form. 0 stands for the exact
            form up to 16 outputs, and 4 random vectors beyond: samples differ more than vectors.

    """

    gated: GatedProgram
    objective: Objective
    criterion: GateCriterion
    precision: Precision = "fp32"
    probes: int = 0

    def scores(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return (samples, units) scores of a batch, in float64."""
        leaf = next(
            value for value in pytree.tree_leaves(batch.inputs) if isinstance(value, Tensor)
        )
        dtype = leaf.dtype if leaf.is_floating_point() else torch.float32
        shape = len(batch), self.gated.units
        values = torch.ones(shape, device=leaf.device, dtype=dtype, requires_grad=True)
        with differentiable(self.precision, leaf.device.type):
            outputs = self.gated.run(batch.inputs, values)
        if self.criterion == "output-shift":
            return self._shift(outputs, values, generator)
        target = self.objective.target(outputs, batch.target, generator)
        if self.criterion == "gauss-newton":
            return self._curvature(outputs, values, target, generator)
        with torch.enable_grad():
            loss = self.objective(outputs, target)
            (slope,) = torch.autograd.grad(loss, values, materialize_grads=True)
        slope = slope.detach().double().cpu() * len(batch)  # of each sample's own loss
        return slope.abs() if self.criterion == "taylor" else slope.square() / 2

    def _curvature(
        self, outputs: Any, values: Tensor, target: Any, generator: torch.Generator
    ) -> Tensor:
        logits = single_tensor(outputs)
        assert logits is not None, "chosen only where there is one output"
        vectors = [
            [self.objective.root(logits, target, vector)]
            for (vector,) in self._vectors([logits], generator)
        ]
        return self._squares([logits], vectors, values) * len(values) / 2

    def _shift(self, outputs: Any, values: Tensor, generator: torch.Generator) -> Tensor:
        made = [
            leaf
            for leaf in pytree.tree_leaves(outputs)
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        size = sum(leaf.numel() for leaf in made) / len(values)
        return self._squares(made, self._vectors(made, generator), values) / size

    def _squares(
        self, outputs: Sequence[Tensor], vectors: Sequence[Sequence[Tensor]], values: Tensor
    ) -> Tensor:
        """Sum the squared derivatives along vectors; average where the vectors are random."""
        total = torch.zeros(values.shape, dtype=torch.float64)
        for number, vector in enumerate(vectors, start=1):
            (slope,) = torch.autograd.grad(
                outputs,
                values,
                [part.to(output.dtype) for part, output in zip(vector, outputs, strict=True)],
                retain_graph=number < len(vectors),
                materialize_grads=True,
            )
            total += slope.detach().double().cpu().square()
        return total if self._complete(outputs) else total / len(vectors)

    def _complete(self, outputs: Sequence[Tensor]) -> bool:
        most = self.probes or MOST_EXACT
        return len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].shape[1] <= most

    def _vectors(self, outputs: Sequence[Tensor], generator: torch.Generator) -> list[list[Tensor]]:
        wide = torch.promote_types(outputs[0].dtype, torch.float32)
        device = outputs[0].device
        if self._complete(outputs):
            eye = torch.eye(outputs[0].shape[1], device=device, dtype=wide)
            return [[row.expand(outputs[0].shape)] for row in eye]
        return [
            [
                (torch.randint(2, output.shape, generator=generator) * 2 - 1).to(device, wide)
                for output in outputs
            ]
            for _ in range(self.probes or FEW)
        ]
