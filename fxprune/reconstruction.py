"""Reconstruction: layer by layer in graph order, on the activations of the mended prefix."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fxprune.activations import Store, Values, Walk
from fxprune.facts import MASKS, REMOVED
from fxprune.layers import layers
from fxprune.program import Program
from fxprune.refit import Fit, Refit, restrict
from fxprune.region import Region, comparable, cut
from fxprune.surgery import set_tensor

GIB = 2**30


@dataclass(frozen=True)
class Settings:
    """How to reconstruct.

    Attributes:
        ridge: how strongly weights hold on to what they are, relative to their features' mean
            square.
        held_out: the share of the samples that judges a change and does not make it.
        memory: the most bytes of activations in memory; the rest lies on disk.

    """

    ridge: float
    held_out: float
    memory: int


@dataclass(frozen=True)
class Mended:
    """What happened to one layer: the mean square errors before and after, and the time taken."""

    layer: str
    until: str
    before: float
    after: float
    seconds: float


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

    Attributes:
        declined: the layers that cannot be mended.

    """

    def __init__(
        self, program: Program, dense: Program, settings: Settings, store: Store, device: str
    ) -> None:
        self._program, self._settings = program, settings
        self._small = Walk(program, store, "program", device)
        self._large = Walk(dense, store, "dense", device)
        self._order = {node: number for number, node in enumerate(dense.graph.nodes)}
        self._problems, self.declined = _plan(program, dense)

    def __len__(self) -> int:
        return len(self._problems)

    def enter(self, inputs: tuple[Any, ...]) -> None:
        """Take a batch of samples, before the first layer is mended."""
        self._small.enter(inputs)
        self._large.enter(inputs)

    def mend(self) -> Iterator[Mended | None]:
        """Mend every layer in turn; yields None for one in which there is nothing to mend."""
        for number, problem in enumerate(self._problems):
            start = time.perf_counter()
            later = {node for other in self._problems[number:] for node in other.wanted}
            self._small.advance(problem.region.layer.node)
            self._large.advance(max(problem.wanted, key=self._order.__getitem__).next, later)
            fit, region = self._fit(problem), problem.region
            seconds = round(time.perf_counter() - start, 3)
            name, until = region.layer.weight, region.outputs[-1].name
            yield None if fit is None else Mended(name, until, fit.before, fit.after, seconds)

    def _fit(self, problem: _Problem) -> Fit | None:
        facts, region = self._program.facts, problem.region
        masks = facts.get(MASKS.name)
        keep = masks.keep.get(region.layer.weight) if masks else None
        refit = Refit(self._program, region, keep)
        total = self._small.batches
        held_out = max(round(self._settings.held_out * total), 1) if total > 1 else 0
        for number in range(total):
            frontier, wanted = self._batch(problem, number)
            refit.add(frontier, wanted, number >= total - held_out)
        if len(region.layer.calls) == 1:
            return refit.apply(self._settings.ridge)
        return self._judged(problem, refit, range(total - held_out if held_out else 0, total))

    def _batch(self, problem: _Problem, number: int) -> tuple[Values, list[Tensor]]:
        """The values before the region, and those it is to reach, for one batch."""
        removed = self._program.facts.get(REMOVED.name)
        wanted = [
            restrict(self._large.value(node, number), node, removed) for node in problem.wanted
        ]
        return self._small.frontier(number), wanted

    def _judged(self, problem: _Problem, refit: Refit, numbers: range) -> Fit | None:
        """Re-fit a layer with several calls; they may feed each other, so look what came of it."""

        def error() -> float:
            return sum(refit.error(*self._batch(problem, number)) for number in numbers)

        stored, before = refit.stored(), error()
        fit = refit.apply(self._settings.ridge)
        if fit is None or error() < before:
            return fit
        for name, value in stored.items():
            set_tensor(self._program, name, value)
        return Fit(fit.before, fit.before)


def _plan(program: Program, dense: Program) -> tuple[tuple[_Problem, ...], tuple[Declined, ...]]:
    usable = comparable(program, dense)
    named = {node.name: node for node in dense.graph.nodes}
    problems, declined = [], []
    for layer in layers(program):
        if not layer.fits:
            declined.append(Declined(layer.node.name, "transposed convolutions are not re-fitted"))
        elif (region := cut(layer, 0, usable)) is None:
            reason = "the dense program has no value that its own could be compared with"
            declined.append(Declined(layer.node.name, reason))
        else:
            problems.append(_Problem(region, tuple(named[node.name] for node in region.outputs)))
    return tuple(problems), tuple(declined)
