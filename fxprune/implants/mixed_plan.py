"""Three tiers under one budget: units that go, units that get an implant, units that stay.

Units of a group are taken in order of their scores: the first go, the next get an implant, in a
fixed proportion. What an implant costs in sensitivity is the unit's score times the share of its
output that the implant leaves unexplained. Of all cuts of a group and kinds of implants, those on
the front of saving against sensitivity are its choices, ascending; a cut of the network is one
choice per group, and the solver works on these as it does on numbers of units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fxprune.graph.facts import Plan, Slot
from fxprune.graph.program import Program
from fxprune.implants.candidates import Prospect, Recipe
from fxprune.implants.costs import ChoiceCosts, Widening, in_chunks
from fxprune.planning.cost_evaluator import Floats, Ledger
from fxprune.planning.cost_model import CostModel
from fxprune.planning.problem import Problem
from fxprune.planning.solver import Solution
from fxprune.structure.groups import Group
from fxprune.structure.merging import Ints

# Units removed; implanted; implanted behind an operator of all input channels (a 1 x 1);
# whether a depthwise operator precedes it; the rank.
COLUMNS = ("removed", "implanted", "mixed", "depthwise", "rank")


@dataclass(frozen=True, eq=False)
class Choices:
    """The mixes that a group may come to.

    Attributes:
        removed, implanted: how many units, by choice.
        recipe: what the implants consist of, by choice, as a position in ``recipes``; -1: none.
        losses: the sensitivity spent.
        recipes: the kinds of implants that there are.
        levels: for each rounding, the numbers of the choices that keep it, ascending.

    """

    removed: Ints
    implanted: Ints
    recipe: Ints
    losses: Floats
    recipes: tuple[Recipe, ...]
    levels: tuple[Ints, ...]

    def table(self, outputs: int) -> Floats:
        """Return what each choice comes to, (choices, ``COLUMNS``)."""
        shares = np.array([recipe.share for recipe in self.recipes] + [0.0])[self.recipe]
        depthwise = np.array([recipe.name == "depthwise" for recipe in self.recipes] + [False])
        rank = np.where(shares > 0, np.maximum(np.rint(shares * self.implanted * outputs), 1), 0)
        mixed = np.where((rank == 0) & (self.recipe >= 0), self.implanted, 0)
        columns = (self.removed, self.implanted, mixed, depthwise[self.recipe], rank)
        return np.stack(columns, axis=1).astype(np.float64)

    def front(self, saved: Floats) -> Choices:
        """Return the choices that no other of their rounding betters, by rising saving.

        The choice that changes least stays in any case.
        """
        order = np.lexsort((-self.losses, saved))
        kept = np.zeros(len(order), dtype=bool)
        for level in self.levels:
            rows = order[np.isin(order, level)]
            beyond = np.minimum.accumulate(self.losses[rows][::-1])[::-1]
            better = self.losses[rows] < np.append(beyond[1:], np.inf)
            kept[rows[better & (saved[rows] > saved[level[0]])]] = True
            kept[level[0]] = True
        chosen = order[kept[order]]
        place = np.cumsum(kept[order])[np.argsort(order)] - 1
        levels = tuple(np.sort(place[level[kept[level]]]) for level in self.levels)
        return Choices(
            self.removed[chosen], self.implanted[chosen], self.recipe[chosen],
            self.losses[chosen], self.recipes, levels,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tiers:
    """The problem with three tiers, and what its solution means.

    Attributes:
        problem: for the solver.
        groups: in the order of the cut.
        orders: by group, its units, the least sensitive first.
        choices: by group.
        prospects: by group name.

    """

    problem: Problem
    groups: tuple[Group, ...]
    orders: tuple[Ints, ...]
    choices: tuple[Choices, ...]
    prospects: Mapping[str, Prospect]

    def plan(self, found: Solution) -> Plan:
        """Return the units of every tier, and the kinds of implants."""
        remove, implant = {}, {}
        kinds: dict[str, str] = {}
        for group, order, mine, number in zip(
            self.groups, self.orders, self.choices, found.removed.tolist(), strict=True
        ):
            first, last = mine.removed[number], mine.removed[number] + mine.implanted[number]
            if first:
                remove[group.name] = tuple(sorted(order[:first].tolist()))
            if mine.implanted[number]:
                recipe = mine.recipes[mine.recipe[number]]
                implant[group.name] = tuple(sorted(order[first:last].tolist()))
                prospect = self.prospects[group.name]
                kind = str(recipe.kind(int(last - first) * prospect.outputs))
                kinds |= {site.weight: kind for site in prospect.sites}
        return Plan(remove, implant, found.notes, kinds=kinds)


def tiers(
    program: Program, problem: Problem, model: CostModel, scores: Sequence[Floats],
    orders: Sequence[Ints], found: Mapping[str, Prospect], ratio: float,
) -> Tiers:  # fmt: skip
    """Widen a problem of removal to one of three tiers.

    Args:
        program: what is planned for.
        problem: of removal alone.
        model: the costs of removal, over the groups of the problem.
        scores: by group, in rising order.
        orders: by group, its units in that order.
        found: by group name, what implants would leave unexplained.
        ratio: the share of each group's cut that gets an implant.

    """
    ledger = Ledger.of(_widened(model, program, found), problem.costs.quantities)
    whole = np.zeros(len(COLUMNS) * len(model.groups))
    dense = ledger.values(whole[None])[0]
    columns = tuple(
        np.arange(len(COLUMNS)) * len(model.groups) + number for number in range(len(model.groups))
    )
    choices = []
    for number, group in enumerate(model.groups):
        prospect = found.get(group.name)
        mixes = _mixes(problem, number, scores[number], orders[number], prospect, ratio)
        cuts = np.repeat(whole[None], len(mixes.removed), axis=0)
        cuts[:, columns[number]] = mixes.table(prospect.outputs if prospect else 1)
        saved = ((dense - in_chunks(ledger, cuts)) / problem.limits).sum(axis=1)
        choices.append(mixes.front(saved))
    tables = tuple(
        mine.table(found[group.name].outputs if group.name in found else 1)
        for group, mine in zip(model.groups, choices, strict=True)
    )
    units = tuple((mine.removed, len(own)) for mine, own in zip(choices, scores, strict=True))
    wide = replace(
        problem,
        costs=ChoiceCosts(ledger, tables, columns),
        losses=tuple(mine.losses for mine in choices),
        levels=tuple(zip(*(mine.levels for mine in choices), strict=True)),
        units=units,
    )
    return Tiers(wide, model.groups, tuple(orders), tuple(choices), found)


def _widened(model: CostModel, program: Program, found: Mapping[str, Prospect]) -> CostModel:
    """Add for every group the columns of ``COLUMNS``, column by column."""
    count = len(model.groups)
    widening = Widening(model, len(COLUMNS) * count)
    for number, group in enumerate(model.groups):
        prospect = found.get(group.name)
        for site in prospect.sites if prospect else ():
            each = prospect.outputs if prospect else 1
            taps, channels = float(site.taps), widening.slot(Slot(site.weight, 1), site.channels)
            implanted, mixed, depthwise, rank = (
                widening.count((column + 1) * count + number, size)
                for column, size in enumerate((each, each, 1, 1))
            )
            products = [
                (-taps, (implanted, channels)), (1.0, (mixed, channels)),
                (taps, (depthwise, channels)), (taps, (rank, channels)), (1.0, (rank, implanted)),
            ]  # fmt: skip
            widening.add(program, site, products, (implanted,))
    return widening.model()


def _mixes(
    problem: Problem, number: int, scores: Floats, order: Ints, prospect: Prospect | None,
    ratio: float,
) -> Choices:  # fmt: skip
    """The cuts of a group that are allowed, each with its share of implants, of every kind."""
    allowed = [level[number] for level in problem.levels]
    last = np.unique(np.concatenate(allowed))
    implanted = np.rint(ratio * last).astype(np.int64) if prospect and len(last) > 1 else 0 * last
    first = last - implanted
    spent = np.concatenate([[0.0], np.cumsum(scores)])
    plain = implanted == 0
    removed, filled, kinds, losses = [last[plain]], [implanted[plain]], [-1], [spent[last[plain]]]
    recipes = prospect.unexplained if prospect else {}
    for kind, (recipe, unexplained) in enumerate(recipes.items()):
        left = np.concatenate([[0.0], np.cumsum(scores * unexplained[order])])
        saves = ~plain & _saves(prospect, recipe, implanted)
        removed.append(first[saves])
        filled.append(implanted[saves])
        kinds.append(kind)
        losses.append((spent[first] + left[last] - left[first])[saves])
    whole = np.concatenate(removed) + np.concatenate(filled)
    return Choices(
        np.concatenate(removed),
        np.concatenate(filled),
        np.repeat(kinds, [len(part) for part in removed]),
        np.concatenate(losses),
        tuple(recipes),
        tuple(np.flatnonzero(np.isin(whole, counts)) for counts in allowed),
    )


def _saves(prospect: Prospect | None, recipe: Recipe, implanted: Ints) -> NDArray[np.bool_]:
    """Whether implants for so many units cost less than the layers do without."""
    found = np.ones(len(implanted), dtype=bool)
    for site in prospect.sites if prospect else ():
        sizes = (implanted * (prospect.outputs if prospect else 1)).tolist()
        found &= [site.macs(size, recipe.kind(size)) < site.macs(size) for size in sizes]
    return found
