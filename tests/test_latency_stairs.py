from __future__ import annotations

import numpy as np
import pytest

from fxprune.latency import table as latency_table
from fxprune.latency.cache import Host
from fxprune.latency.stairs import WidthSteps, step_of, width_steps
from fxprune.latency.table import ANCHOR_ENTRIES, Table, key_of
from fxprune.latency.timed_model import Entry
from fxprune.planning.widths import Rounding, Widths

WIDTHS = np.arange(8, 65, 8)


@pytest.mark.parametrize("step", [8, 16, 32])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_steps_are_read_off_the_stairs(step: int, noise: float) -> None:
    blocks = -(-WIDTHS // step)
    factors = 1 + noise * np.random.default_rng(0).standard_normal(len(WIDTHS))
    assert step_of((5 + 20 * blocks * step / 8) * factors) == step


def test_a_host_has_steps_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(entries: list[Entry], threads: int) -> dict[str, float]:
        found = {}
        for config, form in entries:
            block = 16 if config.dims[2] == 1 else 8
            found[key_of((config, form))] = 10.0 * -(-config.dims[0] // block) * block
        return found | {key_of(anchor): 50.0 for anchor in ANCHOR_ENTRIES}

    monkeypatch.setattr(latency_table, "measure", measured)
    assert width_steps(Table(Host.here(1), None)) == WidthSteps(dense=8, depthwise=16)


def test_widths_are_whole_steps_where_twice_the_step_rounds_them() -> None:
    for step in (8, 16, 32):
        left = 96 - Widths(96).losses(Rounding(2 * step))
        assert all(width % step == 0 for width in left.tolist() if width >= 2 * step)
