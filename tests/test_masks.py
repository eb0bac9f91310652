from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import trace
from torch import nn

from fxprune.errors import InputError
from fxprune.reconstruction.masks import blocked, blocks_of, follows, read_masks, smallest, uniform

GENERATOR = torch.Generator().manual_seed(0)


def test_patterns_are_read() -> None:
    assert blocks_of("2:4") == (2, 4)
    assert blocks_of("unstructured") is None
    for text in ("0:4", "4:4"):
        with pytest.raises(InputError, match="write for example 2:4"):
            blocks_of(text)


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_keep_as_much_as_any_choice_could(axis: int) -> None:
    weight = torch.randn(8, 8, 3, generator=GENERATOR)
    keep = blocked(weight, axis, 1, 4)
    assert follows(keep, axis, 1, 4)
    assert not follows(~keep, axis, 1, 4)
    for block, kept in zip(
        weight.movedim(axis, -1).reshape(-1, 4), keep.movedim(axis, -1).reshape(-1, 4), strict=True
    ):
        assert block.abs()[kept].sum() == max(abs(float(value)) for value in block)


def test_what_does_not_divide_follows_no_pattern() -> None:
    assert not follows(torch.zeros(2, 6, dtype=torch.bool), 1, 2, 4)


def test_the_smallest_of_all_go_within_the_cap() -> None:
    weights = {
        "a": torch.randn(6, generator=GENERATOR) / 10,
        "b": torch.randn(4, generator=GENERATOR),
    }
    keep = smallest(weights, 0.5, 0.67)
    gone = {name: int((~mask).sum()) for name, mask in keep.items()}
    assert sum(gone.values()) == 5
    assert all(gone[name] <= 0.67 * len(weight) for name, weight in weights.items())

    def loss(a: int, b: int) -> float:
        parts = (weights["a"].abs().sort().values[:a], weights["b"].abs().sort().values[:b])
        return float(sum(part.sum() for part in parts))

    pairs = itertools.product(range(5), range(3))  # as many of each as the cap allows
    best = min((pair for pair in pairs if sum(pair) == 5), key=lambda pair: loss(*pair))
    assert (gone["a"], gone["b"]) == best
    with pytest.raises(InputError, match="raise the cap"):
        smallest(weights, 0.9, 0.5)
    assert smallest({}, 0.5, 0.8) == {}


def test_equal_shares_of_each() -> None:
    weights = {"a": torch.arange(1.0, 9), "b": -torch.arange(10.0, 0, -1)}
    keep = uniform(weights, 0.25)
    assert keep["a"].tolist() == [False] * 2 + [True] * 6
    assert keep["b"].tolist() == [True] * 8 + [False] * 2


def test_files_are_checked_against_the_program(tmp_path: Path) -> None:
    program, path = trace(nn.Linear(4, 2), torch.randn(2, 4)), tmp_path / "masks.safetensors"
    save_file({"weight": torch.eye(2, 4)}, path)
    assert read_masks(path, program)["weight"].tolist() == torch.eye(2, 4).bool().tolist()
    for name, size, message in (
        ("other", (2, 4), "the program has only"),
        ("weight", (4,), "it is"),
    ):
        save_file({name: torch.ones(size)}, path)
        with pytest.raises(InputError, match=message):
            read_masks(path, program)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        read_masks(path, program)
