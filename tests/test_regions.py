from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, relative_error, trace
from torch import Tensor, nn

import fxprune

Forward = Callable[[Any, Tensor], Tensor]


class Layers(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.recurrent = nn.LayerNorm(8), nn.GRU(8, 8, batch_first=True)
        self.act = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, x)


def switched_off(model: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        hidden = model.first(x).relu()
    out: Tensor = model.head(hidden)
    return out


def of_another_device(model: Any, x: Tensor) -> Tensor:
    with torch.autocast("cuda", dtype=torch.float16):
        out: Tensor = model.head(model.first(x).relu())
    return out


def in_low_precision(model: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.first(x).relu()
        hidden = model.norm(hidden) + hidden @ (hidden.t() @ hidden).softmax(-1)
        with torch.autocast("cpu", enabled=False):
            hidden = model.second(hidden.float())
        hidden = model.recurrent(hidden.unsqueeze(1))[0].squeeze(1)
    out: Tensor = model.head(hidden.float())
    return out


def with_gradients(model: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        hidden = model.first(x).relu()
    out: Tensor = model.head(hidden)
    return out


def on_condition(model: Any, x: Tensor) -> Tensor:
    hidden = model.first(x)
    chosen = torch.cond(
        hidden.sum() > 0, lambda h: model.second(h).relu(), lambda h: model.second(-h), (hidden,)
    )
    out: Tensor = model.head(chosen)
    return out


def nested(model: Any, x: Tensor) -> Tensor:
    def yes(hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            chosen: Tensor = torch.cond(hidden.max() > 1, lambda h: h + 1, torch.neg, (hidden,))
            return chosen

    hidden = model.first(x)
    chosen = torch.cond(hidden.sum() > 0, yes, lambda h: -h, (hidden,))
    out: Tensor = model.head(chosen)
    return out


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(
    "forward",
    [switched_off, of_another_device, in_low_precision, with_gradients, on_condition, nested],
)
def test_regions_are_inlined(forward: Forward, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Layers(forward).eval()
    program = trace(model, torch.randn(2, 6))
    assert "higher_order" not in str(program.graph)
    for _ in range(4):
        x = torch.randn(3, 6)
        within = 1e-2 if forward is in_low_precision else 1e-5  # bfloat16 has 8 bits
        assert relative_error(program(x), model(x)) < within
    fxprune.save(program, tmp_path / "p.pt2")
    loaded = fxprune.load(tmp_path / "p.pt2")
    assert_same(loaded(x), program(x))
    free = [group for group in fxprune.find_groups(program) if group.frozen_because is None]
    assert free
    fxprune.remove_units(program, {group: [0, 3] for group in free})
    assert program(x).shape == (3, 3)


def test_no_gradient_passes_where_gradients_are_off() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = model.first(x)
        out: Tensor = model.head(hidden)
        return out

    model = Layers(forward).eval()
    exported = torch.export.export(model, (torch.randn(2, 6),), strict=False)
    program = fxprune.graph.trace.from_exported(exported, (torch.randn(2, 6),))
    assert "higher_order" not in str(program.graph)
    program(torch.randn(2, 6)).sum().backward()
    assert program.tensor("first.weight").grad is None
    assert program.tensor("head.weight").grad is not None


def test_a_choice_by_a_size_stays_and_freezes() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            chosen = torch.cond(x.shape[0] > 4, lambda h: h + 1, lambda h: h - 1, (hidden,))
            return self.head(chosen)  # type: ignore[no-any-return]

    model = Sized().eval()
    program = trace(model, torch.randn(2, 6))
    for rows in (3, 7):
        x = torch.randn(rows, 6)
        if rows < 5 or program.dynamic:
            assert_same(program(x), model(x))
