from __future__ import annotations

import pytest
import torch
from support import trace
from torch import nn

from fxprune.errors import InputError
from fxprune.planning.selection import selected, selected_by_any
from fxprune.structure.groups import find_groups

MODEL = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
GROUPS = tuple(
    group for group in find_groups(trace(MODEL, torch.randn(2, 4))) if group.frozen_because is None
)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("0.weight:0", {"0.weight:0"}),
        ("2.weight", {"0.weight:0", "2.weight:0"}),
        ("2.weight:1", {"0.weight:0"}),
        ("0", {"0.weight:0"}),
        ("*:0", {"0.weight:0", "2.weight:0"}),
        ("[04].weight", {"0.weight:0", "2.weight:0"}),
    ],
)
def test_selects_by_slot_tensor_and_module(pattern: str, names: set[str]) -> None:
    assert selected(pattern, GROUPS) == names


def test_selects_by_any_pattern() -> None:
    assert selected_by_any(("0", "4"), GROUPS) == {"0.weight:0", "2.weight:0"}
    assert selected_by_any((), GROUPS) == frozenset()


def test_names_the_nearest_where_nothing_matches() -> None:
    with pytest.raises(InputError, match=r"no group matches '0.weigth'; did you mean 0.weight"):
        selected("0.weigth", GROUPS)
    with pytest.raises(InputError, match="the program has no groups"):
        selected("x", ())
