"""Operators that have rules: what may be removed around each, and that removal is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import trace
from torch import Tensor, nn

import fxprune
from fxprune.structure.groups import Group
from fxprune.structure.verify import sample_units

EDGES = torch.tensor([[0, 1, 2, 3, 3], [1, 2, 3, 0, 1]])  # from, to


SQUARE = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))


class Between(nn.Module):
    """Something between a layer with eight outputs and one that reads them."""

    def __init__(self, wire: Callable[[Any, Tensor], Tensor], **parts: Any):
        super().__init__()
        self.wire, self.first = wire, nn.Linear(6, 8)
        self.other, self.last = nn.Linear(6, 5), nn.Linear(8, 3)
        self.register_buffer("sources", EDGES[0])
        self.register_buffer("targets", EDGES[1])
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wire(self, self.first(x).tanh()))  # type: ignore[no-any-return]


def index_added(m: Any, h: Tensor) -> Tensor:
    return torch.zeros_like(h).index_add(1, m.targets, h[:, m.sources])


def scattered(reduce: str) -> Callable[[Any, Tensor], Tensor]:
    def wire(m: Any, h: Tensor) -> Tensor:
        where = m.targets[None, :, None].expand(h.shape[0], -1, h.shape[2])
        made = torch.zeros_like(h)
        if reduce == "sum":
            return made.scatter_add(1, where, h[:, m.sources])
        return made.scatter_reduce(1, where, h[:, m.sources], reduce)

    return wire


def put(m: Any, h: Tensor) -> Tensor:
    made = torch.zeros_like(h)
    made[:, m.targets] = h[:, m.sources]
    return made


def stepped(m: Any, h: Tensor) -> Tensor:
    state = None
    for step in range(h.shape[1]):
        state = m.cell(h[:, step], state)
    return state[0] if isinstance(state, tuple) else state  # type: ignore[return-value]


def spectral(m: Any, h: Tensor) -> Tensor:
    z = torch.fft.rfft(h, dim=1)
    image: Tensor = torch.fft.irfft(torch.complex(m.mix(z.real), z.imag), n=h.shape[1], dim=1)
    return image


def heads(kind: str) -> Callable[[Any, Tensor], Tensor]:
    def wire(_: Any, h: Tensor) -> Tensor:
        rows, tokens, _width = h.shape
        q = h.view(rows, tokens, 4, 2).transpose(1, 2).reshape(rows * 4, tokens, 2)
        a = q @ q.transpose(1, 2)
        if kind == "zeros":
            a = a + torch.zeros(rows * 4, tokens, tokens)
        elif kind == "ones":
            a = a * a.new_ones(rows * 4, 1, 1)
        elif kind == "full, of its size":
            a = a + torch.full((a.shape[0], 1, tokens), 0.5)
        elif kind == "expand":
            order = torch.arange(tokens).flip(0)[None, None].expand(rows * 4, tokens, tokens)
            a = a.gather(2, order)
        elif kind == "expand as":
            a = a + torch.ones(1, tokens, tokens).expand_as(a)
        out = (a.softmax(-1) @ q).view(rows, 4, tokens, 2).transpose(1, 2)
        return out.reshape(rows, tokens, 8)

    return wire


# By name: the wire, parts of the model, and how many units of the first layer can be removed.
WIRES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any], int]] = {
    "index_add": (index_added, {}, 8),
    "scatter_add": (scattered("sum"), {}, 8),
    "scatter_reduce": (scattered("mean"), {}, 8),
    "index_put": (put, {}, 8),
    "bits": (lambda _, h: h * ((h > -0.5) & ~(h > 0.5) | (h == 2)), {}, 8),
    "logical": (lambda _, h: h * torch.logical_and(h > -0.5, h < 0.5), {}, 8),
    "recurrent cell": (stepped, {"cell": nn.RNNCell(8, 8)}, 8),
    "gated cell": (stepped, {"cell": nn.GRUCell(8, 8)}, 8),
    "cell with memory": (stepped, {"cell": nn.LSTMCell(8, 8)}, 8),
    "projections": (lambda m, h: m.cell(h)[0], {"cell": nn.LSTM(8, 12, 2, proj_size=8)}, 8),
    "spectrum": (spectral, {"mix": nn.Linear(8, 8)}, 8),
    "tensordot": (lambda m, h: torch.tensordot(h, m.w, ([2], [0])), {"w": SQUARE}, 8),
    "inner": (lambda m, h: torch.inner(h, m.w), {"w": SQUARE}, 8),
    "taken along": (lambda _, h: h.take_along_dim(h.argmin(1, keepdim=True), 1), {}, 8),
    "larger of two": (lambda _, h: torch.max(h, -h.flip(1)), {}, 8),
    **{
        f"batch times heads: {kind}": (heads(kind), {}, 4)
        for kind in ("none", "zeros", "ones", "full, of its size", "expand", "expand as")
    },
}  # fmt: skip


def of_first(program: fxprune.Program) -> list[Group]:
    return [
        group
        for group in fxprune.find_groups(program)
        if group.frozen_because is None and "first.weight:0" in map(str, group.slots)
    ]


@pytest.mark.parametrize("name", WIRES)
def test_removal_is_exact_at_any_batch(name: str) -> None:
    torch.manual_seed(0)
    wire, parts, units = WIRES[name]
    program = trace(Between(wire, **parts).eval().double(), torch.randn(2, 4, 6).double())
    groups = of_first(program)
    assert sum(len(group.units) for group in groups) == units
    chosen = sample_units(groups, 0.5)
    for rows in (2, 3):
        x = (torch.randn(rows, 4, 6).double(),)
        error = fxprune.verify_removal(program, chosen, x).error
        assert error is not None
        assert error <= 1e-9
    everything = sample_units(fxprune.find_groups(program), 0.5)
    fxprune.remove_units(program, everything)
    assert program(*x).shape[0] == 3
    again = sample_units(fxprune.find_groups(program), 0.5)  # sizes that were scaled once
    fxprune.remove_units(program, again)
    assert program(*x).shape[0] == 3


def test_all_that_is_flattened_together_but_the_first_stays() -> None:
    class Fusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other, self.last = nn.Linear(6, 8), nn.Linear(6, 5), nn.Linear(40, 3)

        def forward(self, x: Tensor) -> Tensor:
            pairs = self.first(x).tanh().unsqueeze(2) * self.other(x).unsqueeze(1)
            return self.last(pairs.flatten(1))  # type: ignore[no-any-return]

    program = trace(Fusion().eval(), torch.randn(2, 6))
    found = {group.name: group.frozen_because for group in fxprune.find_groups(program)}
    assert found["first.weight:0"] is None
    assert "also belongs to another unit" in (found["other.weight:0"] or "")
    fxprune.remove_units(program, sample_units(fxprune.find_groups(program), 0.5))
    assert program(torch.randn(3, 6)).shape == (3, 3)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cells_count(cell: type[nn.Module]) -> None:
    module = cell(5, 7)
    weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
    program = fxprune.trace(module.eval(), (torch.randn(2, 5),))
    assert fxprune.cost(program).macs == weights


def test_an_embedding_bag_loses_columns() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.last = nn.EmbeddingBag(10, 8, mode="sum"), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.bag(x))  # type: ignore[no-any-return]

    program = trace(Bags().eval(), torch.randint(0, 10, (2, 4)))
    (group,) = (g for g in fxprune.find_groups(program) if g.frozen_because is None)
    assert group.name == "bag.weight:1"
    assert fxprune.verify_removal(program, {group: [0, 3]}).error == pytest.approx(0, abs=1e-6)


def test_rules_decline_what_would_move_other_elements() -> None:
    wires: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "a triangle of it": lambda _, h: h @ (h.transpose(1, 2) @ h).tril(),
        "its diagonal is not the main one": lambda _, h: (
            h * torch.diagonal(h.transpose(1, 2) @ h, 1, 1, 2).sum(1)[:, None, None]
        ),
    }
    for reason, wire in wires.items():
        program = trace(Between(wire).eval(), torch.randn(2, 4, 6))
        frozen = [group.frozen_because or "" for group in fxprune.find_groups(program)]
        assert any(reason in text for text in frozen)
