"""Rankings: the order in which a group's units go, and what it costs in sensitivity."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fxprune.errors import InputError
from fxprune.graph.facts import Sensitivity
from fxprune.planning.cost_evaluator import Floats
from fxprune.structure.groups import Group
from fxprune.structure.merging import Ints

Normalize = Literal["none", "group-mean", "group-max"]


def cheapest_first(sensitivity: Sensitivity, group: Group) -> Ints:
    """Return the numbers of a group's units, the least sensitive first; equals by number."""
    return np.argsort(_scores(sensitivity, group), kind="stable")


def losses(sensitivity: Sensitivity, group: Group, normalize: Normalize) -> Floats:
    """Return the sensitivity spent by number of units lost, from none to all but one."""
    scores = scores_in_order(sensitivity, group, normalize)
    return np.concatenate([[0.0], np.cumsum(scores)[:-1]])


def scores_in_order(sensitivity: Sensitivity, group: Group, normalize: Normalize) -> Floats:
    """Return the scores of a group's units, the least sensitive first."""
    scores = np.sort(_scores(sensitivity, group))
    match normalize:
        case "group-mean":
            scores = scores / max(float(np.abs(scores).mean()), 1e-300)
        case "group-max":
            scores = scores / max(float(np.abs(scores).max()), 1e-300)
    return scores


def _scores(sensitivity: Sensitivity, group: Group) -> Floats:
    scores: Floats = sensitivity.scores[group.name].double().cpu().numpy()
    if len(scores) != len(group.units) or not np.isfinite(scores).all():
        raise InputError(
            f"the scores of group {group.name} do not fit its {len(group.units)} units or are not "
            "finite; run annotate-sensitivity on the current program"
        )
    return scores
