from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxprune.cli.request import Request, keywords, numbers, split, typed
from fxprune.errors import InputError


def test_keywords_are_json_where_they_can_be() -> None:
    texts = ("depth=20", "root=../data", 'names=["a"]', "flag=true", "other=False", "eq=a=b")
    assert keywords(texts, "--data-option") == {
        "depth": 20, "root": "../data", "names": ["a"], "flag": True, "other": False, "eq": "a=b",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["depth", "=3", "a b=3"])
def test_keywords_need_a_name(text: str) -> None:
    with pytest.raises(InputError, match="write name=value"):
        keywords((text,), "--arch-option")


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [("3,32,32", int, (3, 32, 32)), ("224x160", int, (224, 160)), ("0.5", float, (0.5,)),
     (None, int, ())],
)  # fmt: skip
def test_numbers(text: str | None, kind: type[Any], found: tuple[Any, ...]) -> None:
    assert numbers(text, "--mean", kind) == found


@pytest.mark.parametrize("text", ["", "3,", "0,3", "a"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--input-shape"):
        numbers(text, "--input-shape", int)


def test_the_input_shape_makes_an_example() -> None:
    request = Request("m.pt", input_shape="3,8,6")
    (first,), (second,) = request.example_inputs() or (), request.example_inputs() or ()
    assert first.shape == (1, 3, 8, 6)
    assert torch.equal(first, second)
    assert Request("m.pt").example_inputs() is None
    assert Request("m.pt").load_data(0) is None


def test_mean_and_std_reach_the_data(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.full((10, 4, 4, 3), 255, np.uint8), y=np.zeros(10, int))
    data = Request("m.pt", data=str(tmp_path / "d.npz"), mean="0.5", std="0.25").load_data(0)
    assert data is not None
    image, _ = data.calibration[0]
    assert torch.equal(image, torch.full((3, 4, 4), 2.0))


def test_a_recipe_tells_all_but_the_consent() -> None:
    request = Request("m.pt", "timm:x", ("a=1",), trust_pickle=True)
    assert request.recipe_fields() == {"model": "m.pt", "arch": "timm:x", "arch_option": ("a=1",)}
    again, options = split(
        typed(request.recipe_fields() | {"seed": 3, "target": ["macs=50%"]}, "here")
    )
    assert again == Request("m.pt", "timm:x", ("a=1",))
    assert options == {"seed": 3, "target": ("macs=50%",)}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"trust_pickle": True}, r"here: \[run\] cannot set 'trust_pickle'"),
        ({"resume": True}, "cannot set 'resume'"),
        ({"batch-size": "many"}, "'batch-size': expected a whole number, not 'many'"),
    ],
)
def test_a_recipe_may_not_say_everything(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        typed(options, "here")
