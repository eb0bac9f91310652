"""What models take and return: the forms that inputs, samples and outputs have."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.data.batches import batches
from fxprune.data.roles import as_data, without_labels
from fxprune.graph.trace import required_inputs
from fxprune.onnx.export import export_onnx
from fxprune.pipeline.progress import Tracker

X = torch.randn(2, 6)
QUICK: dict[str, Any] = {
    "latency_seconds": 0.02, "verify": False, "progress": Tracker(False), "int8": False,
    "target": "macs=50%",
}  # fmt: skip


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


class Passes(nn.Module):
    """Hands whatever it gets to a network."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, *args: Tensor, **keywords: Tensor) -> Tensor:
        return self.inner(*args, **keywords)  # type: ignore[no-any-return]


class First(nn.Module):
    """Reads the first of a variable number of inputs, and its batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        return self.inner(first + sum(others)).view(first.shape[0], 3)  # type: ignore[no-any-return]


class Around(nn.Module):
    """A network with a compiled part."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "model",
    [
        Passes(), nn.DataParallel(net()), torch.compile(net()), nn.DataParallel(Passes()),
        Around(torch.compile(net())),
    ],
    ids=["args", "DataParallel", "compile", "both", "compiled part"],
)  # fmt: skip
def test_wrappers_keep_a_dynamic_batch(model: nn.Module) -> None:
    program = fxprune.trace(model.eval(), (X,))
    assert program.dynamic == (frozenset({0}),)
    with torch.no_grad():
        torch.testing.assert_close(program(torch.ones(5, 6)), net()(torch.ones(5, 6)))


def test_wrappers_leave_the_names_of_weights() -> None:
    program = fxprune.trace(nn.DataParallel(net()), (X,))
    assert set(program.graph_module.state_dict()) == set(net().state_dict())


def test_variable_inputs_beside_named_ones() -> None:
    program = fxprune.trace(First().eval(), (X, X, X))
    assert program.dynamic == (frozenset({0}),) * 3


class Pair(NamedTuple):
    """Two outputs with names."""

    logits: Tensor
    size: int


class Returns(nn.Module):
    """Returns what a case asks for beside a tensor."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.inner, self.form = net(), form

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        forms = {
            "none": (y, None),
            "dict": {"loss": None, "logits": y},
            "numbers": (y, 3, 0.5, True),
            "named": Pair(y, 7),
            "nested": {"out": [Pair(y, 7), (None, y)]},
        }
        return forms[self.form]


@pytest.mark.parametrize("form", ["none", "dict", "numbers", "named", "nested"])
def test_outputs_stay_what_they_are(form: str, tmp_path: Path) -> None:
    model = Returns(form).eval()
    program = fxprune.trace(model, (X,))
    fxprune.save(program, tmp_path / "m.pt2")
    again = fxprune.load(tmp_path / "m.pt2")
    with torch.no_grad():
        expected, loaded = model(X), again(X)
    assert str(loaded) == str(expected)  # the names of named tuples among them
    check = export_onnx(program, tmp_path / "m.onnx")
    assert check.parity is not None
    assert check.parity < 1e-5


def test_named_tuples_keep_their_fields_without_their_class(tmp_path: Path) -> None:
    gone = namedtuple("gone", "first second")

    class Made(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return gone(x + 1, x + 2)

    fxprune.save(fxprune.trace(Made(), (X,)), tmp_path / "m.pt2")
    found = fxprune.load(tmp_path / "m.pt2")(X)
    assert type(found).__name__ == "gone"
    assert torch.equal(found.second, X + 2)


class Table(nn.Module):
    """Takes a dictionary of numbers and categories."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.kinds = nn.Linear(6, 8), nn.Embedding(5, 8)
        self.out = nn.Linear(16, 3)

    def forward(self, row: dict[str, Tensor]) -> Tensor:
        joined = torch.cat([self.numbers(row["x"]).relu(), self.kinds(row["kind"]).mean(1)], 1)
        return self.out(joined)  # type: ignore[no-any-return]


def test_a_dictionary_of_inputs_is_exported(tmp_path: Path) -> None:
    row = {"x": torch.randn(2, 6), "kind": torch.randint(5, (2, 4))}
    program = fxprune.trace(Table().eval(), (row,))
    assert program.dynamic == (frozenset({0}), frozenset({0}))
    check = export_onnx(program, tmp_path / "m.onnx")
    assert check.parity is not None
    assert check.parity < 1e-5


class Sum(nn.Module):
    """Two inputs; a tensor and None as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(6, 16), nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, left: Tensor, right: Tensor) -> Any:
        return self.out((self.left(left) + self.right(right)).relu()), None


LEFT, RIGHT = torch.randn(20, 6), torch.randn(20, 4)
FORMS: dict[str, Any] = {
    "pairs": list(zip(LEFT, RIGHT, strict=True)),
    "lists": [list(pair) for pair in zip(LEFT, RIGHT, strict=True)],
    "pairs alone in a tuple": [(pair,) for pair in zip(LEFT, RIGHT, strict=True)],
    "pairs and no target": [(pair, None) for pair in zip(LEFT, RIGHT, strict=True)],
    "two tensors": (LEFT, RIGHT),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_unlabelled_samples_is_understood(form: str) -> None:
    data = without_labels(as_data({"calibration": FORMS[form], "eval": None}), 2)
    (batch,) = batches(data.calibration, 20)
    assert batch.target is None
    assert all(map(torch.equal, batch.inputs, (LEFT, RIGHT)))


def test_labelled_samples_keep_their_labels() -> None:
    labels = torch.arange(20)
    for source in ((LEFT, RIGHT, labels), list(zip(LEFT, RIGHT, labels, strict=True))):
        data = without_labels(as_data({"train": source, "eval": None}), 2)
        (batch,) = batches(data.calibration, 20)
        assert len(batch.inputs) == 2
        assert torch.equal(torch.as_tensor(batch.target), labels)
    single = without_labels(as_data({"train": (LEFT, labels), "eval": None}), 1)
    assert next(batches(single.calibration, 4)).target is not None


def test_inputs_are_counted_by_the_signature() -> None:
    assert required_inputs(Sum()) == 2
    assert required_inputs(nn.DataParallel(Sum())) == 2
    assert required_inputs(Passes()) is None
    assert required_inputs(fxprune.trace(Sum().eval(), (LEFT, RIGHT))) == 2


def test_unlabelled_pairs_compile() -> None:
    result = fxprune.compile(Sum().eval(), data=FORMS["pairs"], **QUICK)
    assert result.report.target_met
    assert any("without labels" in note for note in result.report.notes)
    assert result.report.after.accuracy is not None


def test_a_batch_that_had_to_be_fixed_is_reported() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.view(2, 6)).relu()  # type: ignore[no-any-return]

    result = fxprune.compile(Fixed().eval(), (X,), data=torch.randn(8, 6), **QUICK)
    assert any("batch size is fixed to 2" in note for note in result.report.notes)
