from __future__ import annotations

import pytest
import torch
from support import assert_same, randomise_norms, trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.errors import InputError
from fxprune.graph.facts import REMOVED
from fxprune.structure.groups import find_groups
from fxprune.structure.permutation import permute_units
from fxprune.structure.removal import remove_units

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Padded(nn.Module):
    """A residual stream whose shortcut is padded with zero channels, a depthwise layer, heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.wide(F.relu(self.depth(x))) + F.pad(x, (0, 0, 0, 0, 4, 4))
        return self.head(F.adaptive_avg_pool2d(F.relu(x), 2).flatten(1))  # type: ignore[no-any-return]


MODELS = {
    "padded": Padded(),
    "attention": nn.Sequential(
        nn.Flatten(2), nn.Linear(64, 16), nn.TransformerEncoderLayer(16, 4, 24, batch_first=True),
        nn.Flatten(), nn.Linear(48, 2),
    ),
    "shuffle": nn.Sequential(nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.Conv2d(4, 2, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_reordering_changes_nothing(name: str) -> None:
    program = trace(randomise_norms(MODELS[name]).double().eval(), X)
    expected = program(X)
    weights = [program.tensor(str(node.target)).clone() for node in program.tensor_nodes()]
    generator = torch.Generator().manual_seed(1)
    orders = {
        group: torch.randperm(len(group.units), generator=generator).tolist()
        for group in find_groups(program)
        if group.frozen_because is None
    }
    assert orders
    permute_units(program, orders)
    program.verify()
    assert_same(program(X), expected)
    after = [program.tensor(str(node.target)) for node in program.tensor_nodes()]
    assert any(not torch.equal(a, b) for a, b in zip(after, weights, strict=True))


def test_a_unit_comes_to_where_the_other_was() -> None:
    program = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), X.float())
    weight = program.tensor("0.weight").detach().clone()
    read = program.tensor("1.weight").detach().clone()
    group = find_groups(program)[0]
    assert group.name == "0.weight:0" or group.frozen_because
    group = next(found for found in find_groups(program) if found.name == "0.weight:0")
    permute_units(program, {group: [2, 0, 3, 1]})
    assert torch.equal(program.tensor("0.weight"), weight[[2, 0, 3, 1]])
    assert torch.equal(program.tensor("1.weight"), read[:, [2, 0, 3, 1]])


def test_what_removal_left_is_followed() -> None:
    program = trace(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)), X.float())
    (node,) = (n for n in program.graph.nodes if n.name == "conv2d")

    def group() -> object:
        return next(found for found in find_groups(program) if found.name == "0.weight:0")

    remove_units(program, {group(): [1, 4]})  # type: ignore[dict-item]
    permute_units(program, {group(): [3, 1, 0, 2]})  # type: ignore[dict-item]
    assert program.get(REMOVED).kept[node.name][1].tolist() == [5, 2, 0, 3]


def test_refuses_what_would_change_the_output() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.one(x).chunk(2, 1)
            return self.two(torch.cat([left.relu(), right.sigmoid()], 1))  # type: ignore[no-any-return]

    program = trace(Halves(), X.float())
    groups = {group.name: group for group in find_groups(program)}
    with pytest.raises(InputError, match="used in different ways"):
        permute_units(program, {groups["one.weight:0"]: [3, 1, 2, 0]})


def test_refuses_an_order_that_is_none() -> None:
    program = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), X.float())
    groups = {group.name: group for group in find_groups(program)}
    with pytest.raises(InputError, match="must name every unit once"):
        permute_units(program, {groups["0.weight:0"]: [0, 1, 1, 2]})
    frozen = next(group for group in groups.values() if group.frozen_because)
    with pytest.raises(InputError, match="is frozen"):
        permute_units(program, {frozen: range(len(frozen.units))})
