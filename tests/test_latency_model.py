from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import trace
from torch import Tensor, nn

from fxprune.graph.program import Program
from fxprune.latency.cache import Host, Timing
from fxprune.latency.layer_config import LayerConfig
from fxprune.latency.model import Calibration, LatencyLedger
from fxprune.latency.table import Table, key_of
from fxprune.latency.terms import Axis, configs_of, elements_of, latency_terms
from fxprune.structure.groups import Group, find_groups
from fxprune.structure.removal import remove_units

HOW = Calibration(per_us=0.5e-3, per_element=2e-6, fixed=0.25)


class Wired(nn.Module):
    """A residual, a depthwise and a grouped convolution, a concatenation, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.depth, self.c = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 80, 1)
        self.mix, self.grouped = nn.Conv2d(104, 64, 1), nn.Conv2d(64, 64, 1, groups=4)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = x + self.b(x)
        x = torch.cat([x, self.c(self.depth(x).relu())], 1)
        return self.head(self.grouped(self.mix(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.down = nn.Linear(24, 96), nn.Linear(96, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())  # type: ignore[no-any-return]


def removable(program: Program) -> tuple[Group, ...]:
    return tuple(group for group in find_groups(program) if group.frozen_because is None)


WIRED = trace(Wired().eval(), torch.randn(2, 3, 8, 8))
ATTENTION = trace(Attention().eval(), torch.randn(1, 5, 24))
GROUPS = {id(program): removable(program) for program in (WIRED, ATTENTION)}


def work(shape: LayerConfig) -> float:
    """A layer's multiply-accumulates, with a convolution's channels in whole blocks."""
    if "conv" not in shape.kind:
        return float(math.prod(shape.dims))
    channels, outputs, per_group = shape.dims
    groups = channels // per_group
    if groups in (1, channels):
        blocks = (8 * math.ceil(n / 8) if n > 8 else n for n in (outputs, per_group))
        return math.prod(blocks) * math.prod(shape.geometry[:4])
    return outputs * per_group * math.prod(shape.geometry[:4])


def table_for(shapes: Iterable[LayerConfig], noise: float = 0.0) -> Table:
    random = np.random.default_rng(0)
    table = Table(Host.here(1), None)
    for shape in dict.fromkeys(shapes):
        factor = 1 + noise * float(random.standard_normal())
        table.times[key_of((shape, "fp32"))] = Timing(max(factor, 0.1) * work(shape), 0.0, 0.0)
    return table


def ledger_of(program: Program, noise: float = 0.0) -> LatencyLedger:
    groups = GROUPS[id(program)]
    terms = latency_terms(program, groups)
    table = table_for((shape for term in terms for shape in term.configs), noise)
    return LatencyLedger.of(terms, len(groups), table, HOW)


def after(program: Program, removed: Sequence[int]) -> Program:
    small = program.copy()
    named = {group.name: group for group in find_groups(small)}
    pairs = zip(GROUPS[id(program)], removed, strict=True)
    remove_units(small, {named[group.name]: range(n) for group, n in pairs if n})
    return small


def expected(program: Program, removed: Sequence[int]) -> float:
    small = after(program, removed)
    return HOW.predict(small, table_for(configs_of(small)))


def test_knots_are_blocks_and_the_whole() -> None:
    shrink = np.zeros(1)
    assert Axis(20, shrink).knots(9) == (8, 16, 20)
    assert Axis(64, shrink).knots(9) == (8, 16, 24, 32, 40, 48, 56, 64)
    assert Axis(96, shrink).knots(9) == (8, 16, 32, 48, 64, 80, 96)
    assert Axis(960, shrink).knots(9) == (8, 128, 256, 384, 512, 640, 768, 896, 960)
    assert Axis(4, shrink).knots(9) == (1, 2, 3, 4)
    assert Axis(1, shrink).knots(9) == (1,)


def test_dimensions_that_shrink_together_are_one_axis() -> None:
    groups = GROUPS[id(WIRED)]
    assert [len(group.units) for group in groups] == [24, 80, 16, 16]
    terms = [term for term in latency_terms(WIRED, groups) if term.configs]
    lengths = [tuple(axis.length for axis in term.axes) for term in terms]
    assert lengths == [(24,), (24,), (24,), (24, 80), (104, 64), (16, 64), (64,)]
    for term in terms:
        for shape in term.configs:
            channels, outputs, per_group = (*shape.dims, 1, 1)[:3]
            assert shape.kind != "conv" or channels % per_group == 0
            assert shape.kind != "conv" or outputs % (channels // per_group) == 0


CUTS = [(0, 0), (8, 16), (16, 48), (16, 72), (0, 40)]


@pytest.mark.parametrize("cut", CUTS)
def test_values_are_those_of_the_program_after_the_cut(cut: tuple[int, int]) -> None:
    """On blocks of eight, with times that are products of widths, nothing is lost."""
    removed = (*cut, 0, 0)
    (value,) = ledger_of(WIRED).values(np.array([removed]))[0]
    assert value == pytest.approx(expected(WIRED, removed), rel=1e-9)


@settings(max_examples=20)
@given(st.integers(0, 2), st.integers(0, 88))
def test_widths_between_the_knots_are_interpolated(heads: int, hidden: int) -> None:
    """Exactly, where times are products of widths; below the least knot nothing more is saved."""
    (value,) = ledger_of(ATTENTION).values(np.array([(heads, hidden)]))[0]
    assert value == pytest.approx(expected(ATTENTION, (heads, hidden)), rel=1e-9)


def test_widths_within_a_block_take_as_long_as_the_block() -> None:
    ledger = ledger_of(WIRED)
    cuts = np.array([[0, 0, 0, 0], [3, 0, 0, 0], [7, 0, 0, 0], [8, 0, 0, 0]])
    outside = [HOW.per_element * elements_of(after(WIRED, cut)) for cut in cuts.tolist()]
    whole, three, seven, eight = ledger.values(cuts)[:, 0] - outside
    # What reads the concatenation of 104 channels is a block narrower after eight.
    assert whole == pytest.approx(three, rel=1e-9) == seven
    assert eight < 0.9 * seven


cuts = st.tuples(*(st.integers(0, len(group.units) - 1) for group in GROUPS[id(WIRED)]))
NOISY = ledger_of(WIRED, noise=0.3)


@given(cuts, st.lists(st.tuples(st.integers(0, 3), st.integers(0, 15)), min_size=1, max_size=9))
def test_changes_are_differences_of_values(
    removed: tuple[int, ...], wanted: list[tuple[int, int]]
) -> None:
    start = np.array(removed)
    groups, new = np.array(wanted).T
    several = np.repeat(start[None], len(wanted), axis=0)
    several[np.arange(len(wanted)), groups] = new
    right = NOISY.values(several) - NOISY.values(start[None])
    np.testing.assert_allclose(NOISY.changes(start, groups, new), right, atol=1e-12)


@given(cuts, st.integers(0, 3))
def test_removing_more_never_takes_longer_whatever_the_noise(
    removed: tuple[int, ...], group: int
) -> None:
    more = list(removed)
    more[group] = min(more[group] + 1, len(GROUPS[id(WIRED)][group].units) - 1)
    first, second = NOISY.values(np.array([removed, more]))[:, 0]
    assert second <= first * (1 + 1e-12)
