from __future__ import annotations

import pytest
import torch
from support import trace
from torch import nn

from fxprune.errors import InputError
from fxprune.graph.facts import Sensitivity
from fxprune.planning.selection import candidates, names_of, shares
from fxprune.structure.groups import find_groups

MODEL = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
GROUPS = tuple(
    group for group in find_groups(trace(MODEL, torch.randn(2, 4))) if group.frozen_because is None
)


SENSITIVITY = Sensitivity("l2", {group.name: torch.ones(len(group.units)) for group in GROUPS})


def test_a_group_answers_to_its_slots_tensors_and_modules() -> None:
    (first, _) = GROUPS
    assert first.name == "0.weight:0"
    assert {"0.weight:0", "2.weight:1", "0.weight", "2.weight", "0", "2"} <= set(names_of(first))


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ((), ["0.weight:0", "2.weight:0"]),
        (("0.weight:0",), ["2.weight:0"]),
        (("2.weight",), []),
        (("2.weight:1",), ["2.weight:0"]),
        (("*:0",), []),
        (("0", "4"), []),
    ],
)
def test_protected_groups_are_no_candidates(patterns: tuple[str, ...], left: list[str]) -> None:
    chosen, skips = candidates(GROUPS, SENSITIVITY, patterns)
    assert [group.name for group in chosen] == left
    assert {skip.reason for skip in skips} <= {"protected by the user"}


def test_the_first_ratio_counts() -> None:
    assert shares({"0": 0.5, "*:0": 0.25}, GROUPS) == {"0.weight:0": 0.5, "2.weight:0": 0.25}


def test_a_pattern_that_matches_no_group_is_refused() -> None:
    reason = r"plan-channels\{protect\}: no group matches '0.weigth'; did you mean 0.weight"
    with pytest.raises(InputError, match=reason):
        candidates(GROUPS, SENSITIVITY, ("0.weigth",))
    with pytest.raises(InputError, match=r"plan-channels\{ratios\}: no group matches 'x'"):
        shares({"x": 0.5}, ())
