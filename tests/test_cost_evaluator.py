from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import trace
from torch import nn

from fxprune.graph.cost import cost
from fxprune.planning.cost_evaluator import Ledger, Ledgers
from fxprune.planning.cost_model import cost_model
from fxprune.structure.groups import find_groups
from fxprune.structure.removal import remove_units


class Shared(nn.Module):
    """A residual, a depthwise convolution, a concatenation and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.depth, self.c = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 5, 1)
        self.norm, self.head = nn.BatchNorm2d(11), nn.Linear(11 * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        x = x + self.b(x)
        x = torch.cat([x, self.c(self.depth(x.relu()))], 1)
        return self.head(self.norm(x).flatten(1))  # type: ignore[no-any-return]


PROGRAM = trace(Shared(), torch.randn(2, 3, 4, 4))
GROUPS = tuple(group for group in find_groups(PROGRAM) if group.frozen_because is None)
LEDGER = Ledger.of(cost_model(PROGRAM, GROUPS), ("macs", "params", "weight_bytes"))
counts = st.tuples(*(st.integers(0, len(group.units) - 1) for group in GROUPS))


def test_has_groups_of_several_kinds() -> None:
    assert [len(group.units) for group in GROUPS] == [6, 5]


@given(counts)
def test_values_are_those_of_the_program_after_the_cut(removed: tuple[int, ...]) -> None:
    program = PROGRAM.copy()
    groups = find_groups(program)
    named = {group.name: group for group in groups}
    remove_units(
        program,
        {named[group.name]: range(n) for group, n in zip(GROUPS, removed, strict=True) if n},
    )
    after = cost(program)
    values = LEDGER.values(np.array([removed]))
    assert values.tolist() == [[after.macs, after.params, after.weight_bytes]]


@given(counts, st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), min_size=1, max_size=9))
def test_changes_are_differences_of_values(
    removed: tuple[int, ...], wanted: list[tuple[int, int]]
) -> None:
    start = np.array(removed)
    groups, new = np.array(wanted).T
    cuts = np.repeat(start[None], len(wanted), axis=0)
    cuts[np.arange(len(wanted)), groups] = new
    expected = LEDGER.values(cuts) - LEDGER.values(start[None])
    np.testing.assert_allclose(LEDGER.changes(start, groups, new), expected, atol=1e-6)


def test_adds_up_equal_products() -> None:
    model = cost_model(PROGRAM, GROUPS)
    assert len(LEDGER.factors) < len(model.factors)


def test_stands_side_by_side() -> None:
    model = cost_model(PROGRAM, GROUPS)
    both = Ledgers((Ledger.of(model, ("params",)), Ledger.of(model, ("macs",))))
    assert both.quantities == ("params", "macs")
    cut, groups, new = np.array([[1, 2]]), np.array([0, 1]), np.array([3, 0])
    np.testing.assert_allclose(both.values(cut), LEDGER.values(cut)[:, [1, 0]])
    changes = LEDGER.changes(cut[0], groups, new)[:, [1, 0]]
    np.testing.assert_allclose(both.changes(cut[0], groups, new), changes)


def test_refuses_a_quantity_that_a_cost_model_lacks() -> None:
    with pytest.raises(KeyError):
        Ledger.of(cost_model(PROGRAM, GROUPS), ("latency_ms",))
