from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import assert_same, randomise_norms
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import fxprune
from fxprune.structure.verify import sample_units


def newer() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(),
        parametrizations.weight_norm(nn.Conv2d(8, 12, 3), dim=1), nn.ReLU(),
        parametrizations.spectral_norm(nn.Conv2d(12, 8, 3)), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def older() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        first, second = (weight_norm(nn.Conv2d(size, 8, 3)) for size in (3, 8))
    return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(128, 5))


@pytest.mark.parametrize("make", [newer, older])
def test_weights_are_plain_and_channels_are_removed_exactly(make: object) -> None:
    torch.manual_seed(0)
    assert callable(make)
    model = randomise_norms(make()).eval()
    x = torch.randn(2, 3, 8, 8)
    program = fxprune.trace(model, (x,))
    names = set(dict(program.graph_module.named_parameters()))
    assert {"0.weight", "2.weight"} <= names
    assert not any("original" in name or "weight_g" in name for name in names)
    assert_same(program(x), model(x))
    doomed = sample_units(fxprune.find_groups(program), 0.5)
    assert len(doomed) >= 2
    check = fxprune.verify_removal(program, doomed)
    assert check.error is not None
    assert check.error <= 1e-5


class Standardised(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        flat = self.weight.view(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(flat, None, None, training=True, eps=1e-5)
        return nn.functional.conv2d(input, weight.view_as(self.weight), self.bias)


class Centred(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean(1, keepdim=True)) / self.weight.std()
        return nn.functional.linear(input, weight, self.bias)


class Rewritten(nn.Linear):
    """Divides its weight by its norm in place, so that every call after the first finds it so."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data = self.weight.data / self.weight.data.norm()
        return nn.functional.linear(input, self.weight, self.bias)


def spectral(layer: nn.Module) -> nn.Module:
    layer = nn.utils.spectral_norm(layer)
    layer(torch.randn(2, *([8, 6, 6] if isinstance(layer, nn.Conv2d) else [8])))
    return layer


MIXED: dict[str, Callable[[], tuple[nn.Module, nn.Module, tuple[int, ...]]]] = {
    "weight standardisation": lambda: (Standardised(3, 8, 3), Standardised(8, 4, 3), (3, 8, 8)),
    "centred": lambda: (nn.Linear(5, 8), Centred(8, 4), (5,)),
    "rewritten": lambda: (nn.Linear(5, 8), Rewritten(8, 4), (5,)),
    "older spectral norm": lambda: (nn.Conv2d(3, 8, 3), spectral(nn.Conv2d(8, 4, 3)), (3, 8, 8)),
    "older spectral norm of a linear layer": lambda: (
        nn.Linear(5, 8), spectral(nn.Linear(8, 4)), (5,)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXED)
def test_weights_that_stay_are_not_computed_anew_after_a_removal(kind: str) -> None:
    torch.manual_seed(0)
    first, second, shape = MIXED[kind]()
    model = nn.Sequential(first, nn.ReLU(), second).eval()
    x = torch.randn(2, *shape)
    program = fxprune.trace(model, (x,))
    with torch.no_grad():
        expected = model(x)
        assert_same(program(x), expected)
        weight = program.tensor("2.weight").detach().clone()
        group = next(g for g in fxprune.find_groups(program) if g.frozen_because is None)
        assert (len(group.units), group.mixed_by) == (8, ())
        fxprune.remove_units(program, {group: [1, 2, 5]})
        assert torch.equal(program.tensor("2.weight"), weight[:, [0, 3, 4, 6, 7]])


class LowRank(nn.Module):
    """A weight with an update of low rank, and a bias that a small network makes of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.down, self.up = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(8, 4))
        self.seed, self.bias = nn.Parameter(torch.randn(6)), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.up @ self.down
        y = nn.functional.linear(x, weight) + self.bias(self.seed.tanh())
        result: Tensor = self.out(y.relu())
        return result


def test_computations_that_removal_cuts_exactly_stay() -> None:
    torch.manual_seed(0)
    model, x = LowRank().eval(), torch.randn(2, 5)
    program = fxprune.trace(model, (x,))
    names = set(dict(program.graph_module.named_parameters()))
    assert names == set(dict(model.named_parameters()))
    doomed = sample_units(fxprune.find_groups(program), 0.5)
    assert {len(group.units) for group in doomed} >= {4, 8}
    check = fxprune.verify_removal(program, doomed)
    assert check.error is not None
    assert check.error <= 1e-5
