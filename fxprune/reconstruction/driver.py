"""Reconstruction: layer by layer in graph order, on the activations of the mended prefix."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.calibration.layer_matrix import layers
from fxprune.calibration.least_squares import MOST_FEATURES
from fxprune.graph.facts import MASKS, REMOVED
from fxprune.graph.program import Program
from fxprune.host import peak_memory
from fxprune.reconstruction.derivatives import Linearisable
from fxprune.reconstruction.footprint import per_sample
from fxprune.reconstruction.incremental_run import IncrementalRun, Store, Values
from fxprune.reconstruction.layer_solvers import Site, SolverSettings, descend, refit, restrict
from fxprune.reconstruction.region import Region, comparable, cut

GIB = 2**30


@dataclass(frozen=True)
class LayerResult:
    """What happened to one layer.

    Attributes:
        layer: its weight.
        until: the last value that was compared with the dense program's.
        before: the error on samples held out: a mean square after a closed-form solution, relative
            to the dense values and halved with a look ahead.
        after: the same, with the new weights.
        seconds: the time taken.
        cg_steps: steps of conjugate gradients.
        peak_gib: the most memory that the process has had so far; None where it is not told.

    """

    layer: str
    until: str
    before: float
    after: float
    seconds: float
    cg_steps: int
    peak_gib: float | None


@dataclass(frozen=True)
class Declined:
    """A layer that could not be reconstructed, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class _Problem:
    """A layer's region, and the dense nodes whose values it is to reach."""

    region: Region
    wanted: tuple[fx.Node, ...]


class Reconstruction:
    """Walks a program and the dense one side by side, and mends layer after layer.

    Args:
        program: what to mend, in place, in evaluation mode.
        dense: what its values should be, in evaluation mode.
        settings: how.
        store: where activations lie.
        device: where both programs are.
        chosen: tells by its name whether a weight is to be mended; None mends all.

    Attributes:
        declined: the layers that cannot be mended.

    """

    def __init__(
        self, program: Program, dense: Program, settings: SolverSettings, store: Store, device: str,
        chosen: Callable[[str], bool] | None = None, *, lookahead: int = 0,
    ) -> None:  # fmt: skip
        self._program, self._settings, self._lookahead = program, settings, lookahead
        self._small = IncrementalRun(program, store, "program", device)
        self._large = IncrementalRun(dense, store, "dense", device)
        self._order = {node: number for number, node in enumerate(dense.graph.nodes)}
        self._problems, self.declined = _plan(program, dense, settings, lookahead, chosen)
        self._samples = 0

    def __len__(self) -> int:
        return len(self._problems)

    def most_samples(self, memory: int) -> int:
        """Return how many samples a batch may have, so that every region keeps to a memory."""
        curvature = self._settings.curvature if self._lookahead else None
        regions = (problem.region for problem in self._problems)
        return max(memory // max(per_sample(self._program, regions, curvature), 1), 1)

    def enter(self, inputs: tuple[Any, ...]) -> None:
        """Take a batch of samples, before the first layer is mended."""
        self._small.enter(inputs)
        self._large.enter(inputs)
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        self._samples += max((len(leaf) for leaf in leaves if leaf.dim()), default=1)

    def mend(self) -> Iterator[LayerResult | None]:
        """Mend every layer in turn; yields None for one in which there is nothing to mend."""
        for number, problem in enumerate(self._problems):
            start = time.perf_counter()
            later = {node for other in self._problems[number:] for node in other.wanted}
            self._small.advance(problem.region.layer.node)
            self._large.advance(max(problem.wanted, key=self._order.__getitem__).next, later)
            site = self._site(problem)
            if self._lookahead:
                found = descend(site, self._settings)
            else:
                found = refit(site, self._settings.ridge)
            seconds, peak = round(time.perf_counter() - start, 3), peak_memory()
            yield None if found is None else LayerResult(
                problem.region.layer.weight, problem.region.outputs[-1].name,
                found.before, found.after, seconds, found.cg_steps,
                None if peak is None else round(peak / GIB, 3),
            )  # fmt: skip

    def _site(self, problem: _Problem) -> Site:
        total = self._small.batches
        share = self._settings.held_out
        held_out = max(round(share * total), 1) if total > 1 and share else 0
        masks = self._program.facts.get(MASKS.name)
        return Site(
            self._program, problem.region, masks.keep if masks else {},
            lambda number: self._batch(problem, number),
            range(total - held_out), range(total - held_out if held_out else 0, total),
            self._samples,
            self._dense(problem.region),
        )  # fmt: skip

    def _dense(self, region: Region) -> dict[str, Tensor]:
        """The dense program's tensors that a region reads, where it has to be computed with."""
        if self._settings.solver != "paper":
            return {}
        sources = {source for node in region.nodes for source in node.all_input_nodes}
        names = {str(source.target) for source in sources if source.op == "get_attr"}
        return {name: self._large.program.tensor(name).detach() for name in names}

    def _batch(self, problem: _Problem, number: int) -> tuple[Values, list[Tensor]]:
        """The values before the region, and those it is to reach, for one batch."""
        removed = self._program.facts.get(REMOVED.name)
        wanted = [
            restrict(self._large.value(node, number), node, removed) for node in problem.wanted
        ]
        return self._small.frontier(number), wanted


def _plan(
    program: Program,
    dense: Program,
    settings: SolverSettings,
    lookahead: int,
    chosen: Callable[[str], bool] | None,
) -> tuple[tuple[_Problem, ...], tuple[Declined, ...]]:
    usable = comparable(program, dense)
    raw = settings.solver == "paper"
    named = {node.name: node for node in dense.graph.nodes}
    problems, declined = [], []
    derivatives = Linearisable(program, settings.curvature)
    for layer in layers(program):
        if chosen is not None and not chosen(layer.weight):
            continue
        features = program.tensor(layer.weight)[0].numel()
        if features > MOST_FEATURES and not lookahead:
            reason = f"each output has {features:,} weights: the linear system would be too large"
            declined.append(Declined(layer.node.name, reason))
        elif not (layer.fits or lookahead):
            declined.append(Declined(layer.node.name, "transposed convolutions are not re-fitted"))
        elif (region := cut(layer, lookahead, usable, raw=raw)) is None:
            reason = "the dense program has no value to compare its output with"
            declined.append(Declined(layer.node.name, reason))
        else:
            obstacle = None
            if lookahead:
                region, obstacle = derivatives.form(region)
            if obstacle is not None:
                reason = (
                    f"no lookahead from this layer, because a derivative is missing: {obstacle}"
                )
                declined.append(Declined(layer.node.name, reason))
                continue
            problems.append(_Problem(region, tuple(named[node.name] for node in region.outputs)))
    return tuple(problems), tuple(declined)
