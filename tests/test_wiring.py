"""Wirings that are easy to get wrong: what may be removed of each, and that removal is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import assert_same, without_readers
from torch import Tensor, nn

import fxprune
from fxprune.graph.program import Program
from fxprune.structure.verify import sample_units


class Wired(nn.Module):
    """Something between a convolution of 16 channels and one that reads them."""

    def __init__(self, wire: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.wire = wire
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.wire(self, self.first(x)))
        return self.head.forward(hidden.tanh().mean((2, 3)))


def half_overwritten(_: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :8] = x[:, :8].relu()
    return x


def alternately_written(_: Any, x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 16, 8, 8)
    y[:, ::2] = x[:, :8]
    y[:, 1::2] = x[:, 8:]
    return y


def one_overwritten(_: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, -1] = 0.0
    x[:, 3] *= 2
    return x


def windows(_: Any, x: Tensor) -> Tensor:
    return F.fold(F.unfold(x, 3, padding=1), (8, 8), 3, padding=1)


def spectrum(model: Any, x: Tensor) -> Tensor:
    image: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * model.part, s=(8, 8))
    return image


def complex_parts(_: Any, x: Tensor) -> Tensor:
    z = torch.view_as_complex(x.view(x.shape[0], 16, 8, 4, 2))
    parts: Tensor = torch.view_as_real(z * z)
    return parts.flatten(3)


def rotary(_: Any, x: Tensor) -> Tensor:
    x = x.flatten(2).transpose(1, 2)
    even, odd = x[..., ::2], x[..., 1::2]
    turned = torch.stack([-odd, even], -1).flatten(2)
    return turned.transpose(1, 2).reshape(-1, 16, 8, 8)


def channel_attention(model: Any, x: Tensor) -> Tensor:
    y = model.part(x.mean((2, 3)).unsqueeze(1)).sigmoid()
    scale: Tensor = y.transpose(1, 2).unsqueeze(-1)
    return x * scale


def through(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model.part(x)
    return y


def products(model: Any, x: Tensor) -> Tensor:
    return torch.einsum("bchw,cd,de->behw", x, model.part, model.other)


ORDER = torch.tensor([3, 9, 1, 0, 15, 14, 2, 4, 5, 8, 6, 7, 10, 13, 12, 11])
WIRES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any], int]] = {
    "index": (lambda m, x: x[:, m.part], {"part": ORDER}, 16),
    "index_select": (lambda m, x: x.index_select(1, m.part), {"part": ORDER}, 16),
    "repeated index": (lambda m, x: x[:, [0, 0, 1, 2, 3, *range(5, 16)]], {}, 16),
    "roll": (lambda _, x: x.roll(5, 1), {}, 16),
    "flip": (lambda _, x: x.flip(1), {}, 16),
    "shuffle": (lambda m, x: m.part(x), {"part": nn.ChannelShuffle(4)}, 4),
    "half overwritten": (half_overwritten, {}, 16),
    "one overwritten": (one_overwritten, {}, 15),
    "alternately written": (alternately_written, {}, 8),
    "windows": (windows, {}, 16),
    "spectrum": (spectrum, {"part": nn.Parameter(torch.randn(16, 8, 5))}, 16),
    "complex": (complex_parts, {}, 16),
    "rotary": (rotary, {}, 8),
    "gather": (lambda _, x: x.gather(3, torch.zeros_like(x, dtype=torch.int64)), {}, 16),
    "distances": (lambda _, x: torch.cdist(x, x), {}, 16),
    "where": (lambda m, x: torch.where(m.part, x, -x), {"part": ORDER.view(16, 1, 1) > 8}, 16),
    "gate": (lambda _, x: F.glu(torch.cat([x, x.tanh()], 1), 1), {}, 16),
    "first channel": (lambda _, x: x * x[:, :1] + x[:, 0].unsqueeze(1), {}, 15),
    "groups by offset": (through, {"part": nn.Conv2d(16, 16, 3, padding=1, groups=2)}, 8),
    "groups by offset, wider": (
        through,
        {"part": nn.Sequential(nn.Conv2d(16, 24, 1, groups=2), nn.Conv2d(24, 16, 1))},
        8,
    ),
    "groups whole": (through, {"part": nn.Conv2d(16, 16, 1, groups=8)}, 8),
    "groups transposed": (through, {"part": nn.ConvTranspose2d(16, 16, 1, groups=2)}, 8),
    "groups whole, transposed": (through, {"part": nn.ConvTranspose2d(16, 16, 1, groups=8)}, 8),
    "channels multiplied": (
        through,
        {"part": nn.Sequential(nn.Conv2d(16, 32, 1, groups=16), nn.Conv2d(32, 16, 1))},
        16,
    ),
    "products": (
        products,
        {"part": nn.Parameter(torch.randn(16, 10)), "other": nn.Parameter(torch.randn(10, 16))},
        16,
    ),
}


def wired(name: str) -> tuple[Wired, Program]:
    torch.manual_seed(0)
    wire, parts, _ = WIRES[name]
    model = Wired(wire, **parts).eval()
    return model, fxprune.trace(model, (torch.randn(2, 3, 8, 8),))


@pytest.mark.parametrize("name", WIRES)
def test_removal_through_a_wire_equals_not_reading(name: str) -> None:
    model, program = wired(name)
    groups = fxprune.find_groups(program)
    ours = [
        group
        for group in groups
        if group.frozen_because is None and "first.weight" in {slot.tensor for slot in group.slots}
    ]
    assert sum(len(group.units) for group in ours) == WIRES[name][2]
    doomed = sample_units(ours, 0.5)
    x = torch.randn(3, 3, 8, 8)
    assert (check := fxprune.verify_removal(program, doomed)).error is not None
    assert check.error <= 1e-5
    expected = without_readers(model, doomed)(x) if name not in ("products", "distances") else None
    fxprune.remove_units(program, doomed)
    if expected is not None:
        assert_same(program(x), expected)
    assert program.tensor("first.weight").shape[0] < 16


def test_attention_over_neighbouring_channels_mixes_them() -> None:
    model = Wired(channel_attention, part=nn.Conv1d(1, 1, 3, padding=1)).eval()
    program = fxprune.trace(model, (torch.randn(2, 3, 8, 8),))
    group = fxprune.find_groups(program)[0]
    assert len(group.units) == 16
    assert group.mixed_by == ("conv1d",)
    fxprune.remove_units(program, {group: range(0, 16, 2)})
    assert program(torch.randn(3, 3, 8, 8)).shape == (3, 4)


def test_a_frozen_dimension_names_operator_module_line_and_cause() -> None:
    class Softmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(1)

    model = Wired(lambda m, x: m.part(x), part=Softmax()).eval()
    program = fxprune.trace(model, (torch.randn(2, 3, 8, 8),))
    group = next(g for g in fxprune.find_groups(program) if len(g.units) == 16)
    reason = group.frozen_because or ""
    for word in (
        "a softmax normalises",
        "aten.softmax.int at node softmax",
        "module part",
        "test_wir",
    ):
        assert word in reason
    image = next(g for g in fxprune.find_groups(program) if len(g.units) == 3)
    assert "it meets dimension 1 of x, an input of the model" in (image.frozen_because or "")


def test_a_dimension_that_an_unknown_operator_fixed_is_traced_back_to_it() -> None:
    model = Wired(lambda _, x: torch.linalg.matrix_exp(x)).eval()
    program = fxprune.trace(model, (torch.randn(2, 3, 8, 8),))
    reasons = [group.frozen_because or "" for group in fxprune.find_groups(program)]
    assert any("no rule is known for operator" in reason for reason in reasons)
    assert any("whose size is fixed by aten." in reason for reason in reasons)


def test_a_call_that_a_rule_does_not_foresee_freezes() -> None:
    def dynamic(model: Any, x: Tensor) -> Tensor:
        weight = (model.part * x.mean((2, 3))[:, :, None]).view(-1, 1, 3, 3)
        folded = F.conv2d(x.reshape(1, -1, 8, 8), weight, padding=1, groups=16 * x.shape[0])
        return folded.view(-1, 16, 8, 8)

    model = Wired(dynamic, part=nn.Parameter(torch.randn(1, 16, 9))).eval()
    program = fxprune.trace(model, (torch.randn(2, 3, 8, 8),))
    reasons = {
        slot.tensor: group.frozen_because for group in fxprune.find_groups(program)
        for slot in group.slots if slot.dim == 0
    }  # fmt: skip
    assert "number of groups depends on the batch" in (reasons["first.weight"] or "")
    assert reasons["second.weight"] is None
