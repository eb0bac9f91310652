"""Reconstruction layer by layer, in graph order, on what the layers re-fitted before compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.calibration.layer_matrix import layers
from fxprune.calibration.least_squares import MAX_FEATURES
from fxprune.graph.facts import MASKS, REMOVED
from fxprune.graph.program import Program
from fxprune.host import peak_memory
from fxprune.reconstruction.derivatives import Linearisable
from fxprune.reconstruction.footprint import per_sample
from fxprune.reconstruction.incremental_run import IncrementalRun, Store, Values
from fxprune.reconstruction.layer_solvers import (
    LayerProblem,
    SolverSettings,
    descend,
    refit,
    restrict,
)
from fxprune.reconstruction.refit import LayerResult
from fxprune.reconstruction.region import Region, comparable, cut

GIB = 2**30


@dataclass(frozen=True)
class Declined:
    """A layer that could not be reconstructed, and why."""

    node: str
    reason: str


class Reconstruction:
    """Runs a program and the dense one side by side, and re-fits one layer after the other.

    Args:
        program: the program to change, in evaluation mode.
        dense: the program whose values it should have, in evaluation mode.
        settings: of the solvers.
        store: keeps activations.
        device: the device of both programs.
        chosen: whether to re-fit the weight of this name; None for all.
        lookahead: number of operations after each layer to match; 0 solves for its output alone.

    Attributes:
        declined: the layers that cannot be re-fitted.

    """

    def __init__(
        self, program: Program, dense: Program, settings: SolverSettings, store: Store, device: str,
        chosen: Callable[[str], bool] | None = None, *, lookahead: int = 0,
    ) -> None:  # fmt: skip
        self._program, self._settings, self._lookahead = program, settings, lookahead
        self._small = IncrementalRun(program, store, "program", device)
        self._large = IncrementalRun(dense, store, "dense", device)
        self._order = {node: number for number, node in enumerate(dense.graph.nodes)}
        self._regions, self.declined = _plan(program, dense, settings, lookahead, chosen)
        self._samples = 0

    def __len__(self) -> int:
        return len(self._regions)

    def max_batch(self, memory: int) -> int:
        """Return the largest batch size for which every region fits into so many bytes."""
        curvature = self._settings.curvature if self._lookahead else None
        return max(memory // max(per_sample(self._program, self._regions, curvature), 1), 1)

    def enter(self, inputs: tuple[Any, ...]) -> None:
        """Add a batch of samples, before the first layer is re-fitted."""
        self._small.enter(inputs)
        self._large.enter(inputs)
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        self._samples += max((len(leaf) for leaf in leaves if leaf.dim()), default=1)

    def run(self) -> Iterator[LayerResult | None]:
        """Re-fit every layer in turn; yield None for a layer that has no error to reduce."""
        for number, region in enumerate(self._regions):
            start = time.perf_counter()
            later = {node for other in self._regions[number:] for node in other.wanted}
            self._small.advance(region.layer.node)
            self._large.advance(max(region.wanted, key=self._order.__getitem__).next, later)
            problem = self._problem(region)
            if self._lookahead:
                result = descend(problem, self._settings)
            else:
                result = refit(problem, self._settings.ridge)
            seconds, peak = round(time.perf_counter() - start, 3), peak_memory()
            peak_gib = None if peak is None else round(peak / GIB, 3)
            yield result and replace(result, seconds=seconds, peak_gib=peak_gib)

    def _problem(self, region: Region) -> LayerProblem:
        """Return a layer's problem; the last batches are held out."""
        total = self._small.batches
        share = self._settings.held_out
        fitted = total - (max(round(share * total), 1) if total > 1 and share else 0)
        masks = self._program.facts.get(MASKS.name)
        removed = self._program.facts.get(REMOVED.name)
        dense: dict[str, Tensor] = {}
        if self._settings.solver == "paper":  # later layers compute with the dense tensors
            sources = {source for node in region.nodes for source in node.all_input_nodes}
            names = {str(source.target) for source in sources if source.op == "get_attr"}
            dense = {name: self._large.program.tensor(name).detach() for name in names}

        def batch(number: int) -> tuple[Values, list[Tensor]]:
            values = [(self._large.value(node, number), node) for node in region.wanted]
            wanted = [restrict(value, node, removed) for value, node in values]
            return self._small.frontier(number), wanted

        judged = range(fitted if fitted < total else 0, total)
        return LayerProblem(
            self._program, region, masks.keep if masks else {}, batch, range(fitted), judged,
            self._samples, dense,
        )  # fmt: skip


def _plan(
    program: Program,
    dense: Program,
    settings: SolverSettings,
    lookahead: int,
    chosen: Callable[[str], bool] | None,
) -> tuple[tuple[Region, ...], tuple[Declined, ...]]:
    """Return the regions of the layers that can be re-fitted, and the other layers."""
    usable = comparable(program, dense)
    regions, declined = [], []
    derivatives = Linearisable()
    for layer in layers(program):
        if chosen is not None and not chosen(layer.weight):
            continue
        features = program.tensor(layer.weight)[0].numel()
        region, reason = None, "the dense program has no value to compare its output with"
        if features > MAX_FEATURES and not lookahead:
            reason = f"each output has {features:,} weights: the linear system would be too large"
        elif not (layer.fits or lookahead):
            reason = "transposed convolutions are not re-fitted"
        else:
            region = cut(layer, lookahead, usable, raw=settings.solver == "paper")
        if region is not None and lookahead:
            region, obstacle = derivatives.form(region)
            if obstacle is not None:
                reason = (
                    f"no lookahead from this layer, because a derivative is missing: {obstacle}"
                )
                region = None
        if region is None:
            declined.append(Declined(layer.node.name, reason))
        else:
            regions.append(region)
    return tuple(regions), tuple(declined)
