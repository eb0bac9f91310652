"""Set weights to zero in a pattern that every later pass keeps.

Before:
    conv.weight 32x16x3x3

After (pattern 2:4):
    conv.weight 32x16x3x3, two of every four consecutive inputs are zero in each row and kernel
    position

The largest weights stay. Shapes do not change: zeros make the file smaller after compression and
help backends that skip them; ONNX Runtime computes with zeros as with any other number.

``N:M`` counts blocks along the input channels, separately in each channel group. Layers whose
number of inputs per group is not a multiple of M, such as depthwise ones, are skipped; so are
weights that are computed or that operators other than layers read. Biases and norms are never
masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from fxprune.calibration.layer_matrix import Layer, layers
from fxprune.errors import InputError
from fxprune.graph.facts import MASKS, REMOVED, Masks
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass, Skip
from fxprune.pipeline.patterns import select_any, tensor_names
from fxprune.reconstruction.masks import (
    blocked,
    blocks_of,
    follows,
    input_axis,
    read_masks,
    smallest,
    uniform,
)

PATTERNS = ("unstructured", "uniform", "zeros", "file")


@dataclass(frozen=True)
class Sparsify(Pass):
    """Mask weights, and record the masks.

    Attributes:
        pattern: ``N:M`` (such as 2:4) keeps the N largest of every M weights; ``unstructured``
            masks the smallest weights of all layers together; ``uniform`` the smallest of each
            layer; ``zeros`` those that are zero already; ``file`` reads masks from a file.
        sparsity: fraction of the weights to mask, for ``unstructured`` and ``uniform``.
        cap: largest fraction to mask in any one layer, for ``unstructured``.
        file: safetensors file of masks by parameter name; zero or false masks a weight.
        protect: name patterns of weights or modules that are not masked.

    """

    pattern: str = "2:4"
    sparsity: float = 0.5
    cap: float = 0.8
    file: str = ""
    protect: tuple[str, ...] = ()

    name: ClassVar[str] = "sparsify"
    gives: ClassVar[Facts] = frozenset({MASKS})
    keeps: ClassVar[Facts] = frozenset({REMOVED})

    def run(self, program: Program, context: Context) -> Outcome:
        """Mask; changes counts the tensors that lost weights."""
        self._check()
        skips: list[Skip] = []
        chosen = list(self._choose(program, skips))
        weights = {layer.weight: program.tensor(layer.weight).detach() for layer in chosen}
        masks = self._masks(program, chosen, weights)
        earlier = program.facts.get(MASKS.name)
        if earlier:
            masks = _both(earlier.keep, masks)
        changes = 0
        for name, keep in masks.items():
            weight = program.tensor(name).detach()
            if bool((weight[~keep.to(weight.device)] != 0).any()):
                set_tensor(program, name, weight * keep.to(weight.device))
                changes += 1
        program.put(MASKS, Masks({name: keep.cpu() for name, keep in masks.items()}, self.pattern))
        total = sum(keep.numel() for keep in masks.values())
        gone = total - sum(int(keep.sum()) for keep in masks.values())
        details = {"masked": gone, "of": total, "sparsity": round(gone / max(total, 1), 4)}
        return Outcome(changes, tuple(skips), details)

    def ensures(
        self, program: Program, context: Context, outcome: Outcome
    ) -> Iterator[tuple[str, bool]]:
        """Every layer that was not declined keeps at most N of M weights."""
        masks, declined = program.get(MASKS).keep, {skip.node for skip in outcome.skips}
        if (blocks := blocks_of(self.pattern)) is None:
            return
        for layer in layers(program):
            if layer.node.name not in declined:
                holds = follows(masks[layer.weight], input_axis(layer), *blocks)
                yield f"{layer.weight} has the pattern {self.pattern}", holds

    def _check(self) -> None:
        if blocks_of(self.pattern) is None and self.pattern not in PATTERNS:
            raise InputError(
                f"sparsify has no pattern '{self.pattern}'; the patterns are N:M, such as 2:4, "
                f"{', '.join(PATTERNS)}"
            )
        for name in ("sparsity", "cap"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        if (self.pattern == "file") != bool(self.file):
            raise InputError(
                "give file=masks.safetensors with pattern=file, and only with this pattern"
            )

    def _choose(self, program: Program, skips: list[Skip]) -> Iterator[Layer]:
        """The layers that are masked; says of the others why not."""
        blocks = blocks_of(self.pattern)
        protected = select_any(
            self.protect, tensor_names(program), "sparsify{protect}", "weight or module"
        )
        for layer in layers(program):
            inputs = program.tensor(layer.weight).shape[input_axis(layer)]
            if layer.weight in protected:
                skips.append(Skip(layer.node.name, "protected by the user"))
            elif blocks and inputs % blocks[1]:
                reason = f"its {inputs} inputs per group are not a multiple of {blocks[1]}"
                skips.append(Skip(layer.node.name, reason))
            else:
                yield layer

    def _masks(
        self, program: Program, chosen: list[Layer], weights: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if self.pattern == "file":
            return read_masks(Path(self.file), program)
        if self.pattern == "zeros":
            return {name: weight != 0 for name, weight in weights.items()}
        if self.pattern == "uniform":
            return uniform(weights, self.sparsity)
        if self.pattern == "unstructured":
            return smallest(weights, self.sparsity, self.cap)
        blocks = blocks_of(self.pattern)
        assert blocks is not None
        axes = {layer.weight: input_axis(layer) for layer in chosen}
        return {name: blocked(weight, axes[name], *blocks) for name, weight in weights.items()}


def _both(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What both of two sets of masks keep."""
    shared = {
        name: keep & second[name].to(keep.device) for name, keep in first.items() if name in second
    }
    return {**first, **second, **shared}
