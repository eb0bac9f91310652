from __future__ import annotations

import pytest
import torch
from support import trace
from torch import Tensor, nn

from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.errors import InputError
from fxprune.passes import (
    AnnotateSensitivity,
    InsertObservers,
    PlanChannels,
    Reconstruct,
    RemoveBlocks,
    Sparsify,
)
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Pass
from fxprune.pipeline.patterns import select, select_any, tensor_names

NAMES = {1: ("stem.weight", "stem"), 2: ("head.0.weight", "head.0"), 3: ("head.1.weight", "head.1")}


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("stem", {1}),
        ("head.*", {2, 3}),
        ("head.?.weight", {2, 3}),
        ("*.[12].weight", {3}),
        ("*", {1, 2, 3}),
    ],
)
def test_selects_by_every_name(pattern: str, found: set[int]) -> None:
    assert select([pattern], NAMES, "x", "layer") == {pattern: found}


def test_selects_by_any_pattern() -> None:
    assert select_any(["stem", "head.1"], NAMES, "x", "layer") == {1, 3}
    assert select_any([], NAMES, "x", "layer") == frozenset()


@pytest.mark.parametrize(
    ("pattern", "names", "reason"),
    [
        ("Stem", NAMES, r"p\{q\}: no layer matches 'Stem'; did you mean stem"),
        ("haed.*", NAMES, r"did you mean head\.[01]"),
        ("zzz", NAMES, r"the names are stem.weight, stem, head.0.weight, \.\.\."),
        ("zzz", {1: ("a",)}, "the names are a$"),
        ("zzz", {}, "there is none in this model"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(
    pattern: str, names: dict[int, tuple[str, ...]], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        select([pattern], names, "p{q}", "layer")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left, self.right = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.right(self.left(x).relu())
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_a_tensor_answers_to_its_module() -> None:
    names = tensor_names(trace(Net(), torch.randn(2, 3, 8, 8)))
    assert names["left.bias"] == ("left.bias", "left")


@pytest.mark.parametrize(
    ("step", "option"),
    [
        (PlanChannels(macs="60%", protect=("hed*",)), "plan-channels{protect}"),
        (PlanChannels(macs="60%", ratios={"hed*": 0.5}), "plan-channels{ratios}"),
        (RemoveBlocks(macs="99%", protect=("hed*",)), "remove-blocks{protect}"),
        (Sparsify(protect=("hed*",)), "sparsify{protect}"),
        (Reconstruct(only=("hed*",)), "reconstruct{only}"),
        (InsertObservers(fp32=("hed*",)), "insert-observers{fp32}"),
    ],
)
def test_every_pass_refuses_a_misspelt_pattern(step: Pass, option: str) -> None:
    x = torch.randn(16, 3, 8, 8)
    program = trace(Net().eval(), x[:2])
    context = Context(Data(Arrays(x)), dense=program.copy())
    AnnotateSensitivity(criterion="magnitude-l2")(program, context)
    with pytest.raises(InputError) as caught:
        step(program, context)
    assert str(caught.value).startswith(f"{option}: no ")
    assert "'hed*'" in str(caught.value)
