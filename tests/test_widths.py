from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import trace
from torch import nn

from fxprune.errors import InputError
from fxprune.planning.widths import Rounding, Widths, widths
from fxprune.structure.groups import find_groups


def kept(found: Widths, rounding: Rounding, keep: int = 1) -> list[int]:
    return [found.units - int(loss) for loss in found.losses(rounding, keep)]


def test_sixteen_where_32_remain_else_eight_else_four() -> None:
    assert kept(Widths(80), Rounding()) == [80, 64, 48, 32, 24, 16, 12, 8, 4]


def test_a_depthwise_width_is_never_below_a_multiple_of_four() -> None:
    found = Widths(30, depthwise=True)
    assert kept(found, Rounding()) == [30, 24, 16, 12, 8, 4]
    finest = Rounding(1, 4)
    assert kept(found, finest) == [30, 28, 24, 20, 16, 12, 8, 4]


def test_relaxes_step_by_step() -> None:
    steps, rounding = [], Rounding()
    while rounding is not None:
        steps.append((rounding.dense, rounding.depthwise))
        rounding = rounding.finer()  # type: ignore[assignment]  # None ends the loop
    assert steps == [(16, 8), (8, 4), (4, 4), (2, 4), (1, 4)]


def test_a_unit_of_many_channels_may_go_alone() -> None:
    assert kept(Widths(3, (64, 192)), Rounding()) == [3, 2, 1]
    assert kept(Widths(32, (2,)), Rounding()) == [32, 24, 16, 12, 8, 6, 4, 2]


def test_keeps_the_minimum() -> None:
    assert kept(Widths(64), Rounding(), keep=20) == [64, 48, 32, 24]


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 32), st.booleans())
def test_every_width_is_rounded(units: int, channels: int, base: int, depthwise: bool) -> None:
    rounding = Rounding(base, 4 * base)
    losses = Widths(units, (channels,), depthwise).losses(rounding)
    assert losses[0] == 0
    assert (np.diff(losses) > 0).all()
    assert losses[-1] < units
    width = (units - losses[1:]) * channels
    step = rounding.depthwise if depthwise else rounding.dense
    assert (width[width >= 2 * step] % step == 0).all()
    assert (width % (4 if depthwise else 1) == 0).all()


@pytest.mark.parametrize("options", [(0, 8), (16, 2), (16, 6)])
def test_refuses_a_rounding(options: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        Rounding(*options)


def test_reads_channels_and_depthwise_off_the_graph() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1),
        nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip
    program = trace(model, torch.randn(2, 3, 6, 6))
    groups = [group for group in find_groups(program) if group.frozen_because is None]
    assert widths(program, groups) == (Widths(8, (1,), True), Widths(6, (1, 4), False))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], -1, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_a_head_stands_for_its_channels() -> None:
    program = trace(Attention().eval(), torch.randn(2, 5, 32))
    groups = [group for group in find_groups(program) if group.frozen_because is None]
    assert widths(program, groups) == (Widths(4, (8, 24), False),)
