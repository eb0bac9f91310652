from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import randomise_norms, relative_error, trace
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
import fxprune.calibration.layer_matrix
import fxprune.reconstruction.driver
from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.errors import InputError
from fxprune.graph.facts import MASKS, REMOVED
from fxprune.graph.program import Program
from fxprune.passes import Reconstruct, Sparsify
from fxprune.pipeline.context import Context

X = torch.randn(400, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual block of every kind of convolution, with and without norms and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depth, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.mix, self.plain = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.stem(x)))
        x = x + self.mix(F.relu6(self.norm2(self.depth(y))))
        return self.head(F.relu(self.plain(F.relu(x))).mean((2, 3)))  # type: ignore[no-any-return]


def given(model: nn.Module, x: Tensor = X) -> tuple[Program, Context]:
    torch.manual_seed(0)
    program = trace(randomise_norms(model).eval(), x[:2])
    return program, Context(Data(Arrays(x)), dense=program.copy())


def removed(program: Program, tensor: str, units: list[int]) -> None:
    groups = fxprune.find_groups(program)
    (group,) = (
        g for g in groups if any(slot.tensor == tensor and slot.dim == 0 for slot in g.slots)
    )
    fxprune.remove_units(program, {group: units})


def apart(program: Program, context: Context, x: Tensor = X) -> float:
    assert context.dense is not None
    with torch.no_grad():
        return float((program(x) - context.dense(x)).square().mean())


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize("bias", [True, False])
def test_is_the_least_squares_solution(bias: bool) -> None:
    x = torch.randn(300, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3, bias=bias)).double()
    program, context = given(model, x)
    removed(program, "0.weight", [1, 3])
    Reconstruct(ridge=0.0, batch_size=300)(program, context)
    hidden = model[:2](x).detach()[:, [0, 2, 4]].numpy()
    rows = np.hstack([hidden, np.ones((300, 1))]) if bias else hidden
    expected = np.linalg.lstsq(rows, model(x).detach().numpy())[0].T
    np.testing.assert_allclose(program.tensor("2.weight").detach(), expected[:, :3], rtol=1e-6)
    if bias:
        np.testing.assert_allclose(program.tensor("2.bias").detach(), expected[:, 3], rtol=1e-6)


def test_masked_weights_are_solved_for_on_their_support() -> None:
    x = torch.randn(300, 8, dtype=torch.float64) + 1
    model = nn.Linear(8, 3).double()
    program, context = given(model, x)
    Sparsify()(program, context)
    keep = program.get(MASKS).keep["weight"]
    Reconstruct(ridge=0.0, batch_size=300)(program, context)
    assert torch.equal(program.tensor("weight") != 0, keep)
    for row, target in zip(range(3), model(x).detach().T, strict=True):
        rows = np.hstack([x[:, keep[row]].numpy(), np.ones((300, 1))])
        expected = np.linalg.lstsq(rows, target.numpy())[0]
        found = program.tensor("weight").detach()[row][keep[row]]
        np.testing.assert_allclose(found, expected[:-1], rtol=1e-6)


@pytest.mark.parametrize("lookahead", [0, 4])
def test_nothing_moves_where_nothing_was_removed(lookahead: int) -> None:
    program, context = given(Net())
    before = {name: t.clone() for name, t in program.graph_module.state_dict().items()}
    assert Reconstruct(samples=64, lookahead=lookahead)(program, context).changes == 0
    after = program.graph_module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("tensor", ["stem.weight", "plain.weight"])
def test_what_is_left_comes_nearer_to_the_dense_model(tensor: str) -> None:
    program, context = given(Net())
    removed(program, tensor, [0, 3, 5])
    torn = apart(program, context)
    outcome = Reconstruct(samples=320)(program, context)
    solved = apart(program, context, X[320:])
    assert solved < 0.8 * torn
    assert outcome.changes > 0
    assert REMOVED.name in program.facts
    for layer in outcome.details["layers"]:
        assert layer["after"] <= layer["before"]


def test_looking_ahead_comes_nearer_still() -> None:
    program, context = given(Net())
    removed(program, "stem.weight", [0, 3, 5, 6, 9, 11])
    other = program.copy()
    Reconstruct(batch_size=80)(program, context)
    outcome = Reconstruct(batch_size=80, lookahead=12, rounds=2)(other, context)
    assert apart(other, context) < 0.975 * apart(program, context)
    assert len(outcome.details["lookahead"]) == 2
    steps = [layer for told in outcome.details["lookahead"] for layer in told["layers"]]
    assert all(layer["after"] <= layer["before"] for layer in steps)
    assert sum(layer["cg_steps"] for layer in steps) > 0


def test_looks_ahead_by_itself_where_that_takes_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    program, context = given(Net())
    removed(program, "stem.weight", [0, 3, 5])
    step = Reconstruct(samples=80, steps=1, lookahead="auto")
    (told,) = step(program.copy(), context).details["lookahead"]
    assert told["layers"]
    monkeypatch.setattr("fxprune.passes.reconstruct.AUTO_LOOKAHEAD_MAX_MACS", 1e3)
    outcome = step(program, context)
    assert "lookahead" not in outcome.details
    (note,) = outcome.notes
    assert "reconstruct{lookahead=12}" in note


def test_a_look_ahead_is_a_number_or_auto() -> None:
    with pytest.raises(InputError, match="lookahead is far"):
        Reconstruct(lookahead="far")


@pytest.mark.parametrize("curvature", ["newton", "gauss-newton"])
def test_masks_hold_with_a_look_ahead(curvature: Any) -> None:
    program, context = given(Net())
    Sparsify(pattern="uniform", sparsity=0.6)(program, context)
    torn = apart(program, context)
    Reconstruct(batch_size=80, lookahead=3, curvature=curvature)(program, context)
    assert apart(program, context) < 0.6 * torn
    for name, keep in program.get(MASKS).keep.items():
        assert not program.tensor(name)[~keep].any()


def test_incremental_run_may_lie_on_disk() -> None:
    results = []
    for memory in (2.0, 0.0):
        program, context = given(Net())
        removed(program, "stem.weight", [0, 3, 5])
        outcome = Reconstruct(samples=64, batch_size=1, memory_gib=memory)(program, context)
        assert (outcome.details["spilled_gib"] > 0) == (memory == 0)
        results.append(program(X))
    assert torch.equal(*results)


def test_a_shared_layer_counts_all_its_calls() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grow, self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.grow(x))
            return self.head(F.relu(self.layer(F.relu(self.layer(x)))))  # type: ignore[no-any-return]

    x = torch.randn(400, 4)
    program, context = given(Shared(), x)
    removed(program, "grow.weight", [0, 1])
    torn = apart(program, context, x)
    Reconstruct()(program, context)
    assert apart(program, context, x) < 0.8 * torn


def test_transposed_convolutions_are_declined_unless_it_looks_ahead() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 2, 2))
    program, context = given(model)
    removed(program, "0.weight", [0, 1])
    torn = apart(program, context)
    (skip,) = Reconstruct()(program, context).skips
    assert "transposed" in skip.reason
    Reconstruct(lookahead=1)(program, context)
    assert apart(program, context) < 0.8 * torn


def test_needs_the_dense_model() -> None:
    program, context = given(linear(), torch.randn(20, 6))
    with pytest.raises(InputError, match="dense"):
        Reconstruct()(program, Context(context.data))


def test_is_the_same_every_time() -> None:
    outputs = []
    for _ in range(2):
        program, context = given(Net())
        removed(program, "stem.weight", [0, 3, 5])
        Reconstruct(samples=64, lookahead=2)(program, context)
        outputs.append(program(X[:8]))
    assert relative_error(*outputs) == 0


@pytest.mark.parametrize("lookahead", [0, 3])
def test_transformers_come_nearer_too(lookahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # attention has the batch in its second dimension; values come in several blocks
    monkeypatch.setattr(fxprune.calibration.layer_matrix, "BLOCK_ELEMENTS", 2**12)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, 16)
            self.block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.embed(x.flatten(2).mT)).mean(1)  # type: ignore[no-any-return]

    program, context = given(Tokens())
    assert Sparsify()(program, context).changes == 5
    torn = apart(program, context)
    Reconstruct(batch_size=100, lookahead=lookahead)(program, context)
    assert apart(program, context) < 0.6 * torn
    for name, keep in program.get(MASKS).keep.items():
        assert not program.tensor(name)[~keep].any()


def test_too_large_systems_are_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxprune.reconstruction.driver, "MAX_FEATURES", 5)
    program, context = given(linear(), torch.randn(50, 6))
    (skip,) = Reconstruct()(program, context).skips
    assert "each output has 6 weights" in skip.reason


def test_only_what_is_named_is_mended() -> None:
    program, context = given(Net())
    Sparsify(pattern="uniform", sparsity=0.6)(program, context)
    before = {name: t.clone() for name, t in program.graph_module.state_dict().items()}
    outcome = Reconstruct(samples=64, only=("plain", "head.*"))(program, context)
    told = [layer["layer"] for layer in outcome.details["layers"]]
    assert told == ["plain.weight", "head.weight"]
    after = program.graph_module.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed <= {"plain.weight", "plain.bias", "head.weight", "head.bias"}


def test_batches_shrink_to_the_memory() -> None:
    sizes = []
    for memory in (4.0, 3e-4, 0.0):
        program, context = given(Net())
        Sparsify(pattern="uniform", sparsity=0.6)(program, context)
        step = Reconstruct(samples=32, lookahead=3, steps=1, only=("mix",), memory_gib=memory)
        outcome = step(program, context)
        (told,) = outcome.details["lookahead"]
        assert told["samples"] == 32
        sizes.append(told["batch_size"])
    assert sizes[0] == 32 > sizes[1] > sizes[2] == 1


def test_the_settings_of_the_paper() -> None:
    program, context = given(Net())
    Sparsify(pattern="uniform", sparsity=0.6)(program, context)
    torn, before = apart(program, context), program.graph_module.state_dict()
    paper = Reconstruct(lookahead=8, solver="paper", curvature="newton", batch_size=100, steps=4)
    outcome = paper(program, context)
    assert apart(program, context) < 0.8 * torn
    assert "layers" not in outcome.details  # there is no round of least squares
    for name, tensor in program.graph_module.state_dict().items():
        if name not in program.get(MASKS).keep:
            assert torch.equal(tensor, before[name])
    removed(program, "stem.weight", [0])
    with pytest.raises(InputError, match="needs masks"):
        paper(program, context)
    with pytest.raises(InputError, match="lookahead=20"):
        Reconstruct(solver="paper")(program, context)


class Scaled(nn.Module):
    """A channel attention whose gate has one derivative, and PyTorch a decomposition of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(x * F.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True))))  # type: ignore[no-any-return]


def test_looks_past_operators_without_a_second_derivative() -> None:
    program, context = given(Scaled())
    removed(program, "first.weight", [1])
    fitted = program.copy()
    fitted.eval()
    Reconstruct(batch_size=64)(fitted, context)
    outcome = Reconstruct(batch_size=64, lookahead=6)(program, context)
    assert not outcome.skips
    assert apart(program, context) < apart(fitted, context)
    assert outcome.details is not None
    steps = {
        layer["layer"]: layer["cg_steps"] for layer in outcome.details["lookahead"][0]["layers"]
    }
    assert steps["first.weight"] > 0


@torch.library.custom_op("fxprune_tests::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    """Half of a tensor, without any derivative."""
    return x / 2


@halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Halved(nn.Module):
    """A layer before an operator without a derivative, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(halved(F.relu(self.first(x))))  # type: ignore[no-any-return]


def test_declines_where_a_derivative_is_missing() -> None:
    program, context = given(Halved(), torch.randn(64, 6))
    with torch.no_grad():
        program.tensor("last.bias").add_(1.0)  # something to put right
    outcome = Reconstruct(batch_size=16, lookahead=4)(program, context)
    assert {(skip.node, "derivative" in skip.reason) for skip in outcome.skips} == {
        ("linear", True)
    }
    assert apart(program, context, torch.randn(64, 6)) < 1e-6
