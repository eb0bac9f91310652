from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from support import assert_same, randomise_norms, relative_error, trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.errors import PreconditionError
from fxprune.graph.cost import cost
from fxprune.graph.facts import PLAN, REMOVED, Plan
from fxprune.graph.program import Program
from fxprune.graph.serialize import load, save
from fxprune.graph.text import graph_text
from fxprune.onnx.export import export_onnx
from fxprune.passes import (
    ConvertQuantized,
    Finetune,
    FoldBatchNorm,
    ImplantLowRank,
    InsertObservers,
    RecalibrateNorms,
    Reconstruct,
    RemoveChannels,
    TrainQuantized,
)
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Outcome
from fxprune.structure.groups import find_groups
from fxprune.training.evaluate import run_onnx

X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SAMPLES = Arrays(X, torch.arange(24) % 4)
CONTEXT = Context(Data(SAMPLES, SAMPLES, SAMPLES))


class Block(nn.Module):
    """A stem, and a residual block whose shortcut is padded with zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.norm1 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.two, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.norm1(self.one(x)))
        x = F.relu(self.norm2(self.two(y)) + F.pad(x, (0, 0, 0, 0, 4, 4)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def planned(
    implant: dict[str, tuple[int, ...]], model: nn.Module | None = None, **plan: Any
) -> Program:
    torch.manual_seed(0)
    program = trace(randomise_norms(model or Block()).eval(), X[:2])
    program.put(PLAN, Plan({}, implant, **plan))
    return program


def text_of(layer: str, program: Program) -> list[str]:
    return [line for line in graph_text(program).splitlines() if layer in line]


def test_two_operators_and_a_concat() -> None:
    program = planned({"one.weight:0": (0, 5, 6, 11)}, kinds={"one.weight": "pointwise"})
    before, dense = program(X), cost(program)
    outcome = ImplantLowRank()(program, CONTEXT)
    assert outcome.changes == 1
    assert outcome.skips == ()
    kept, implant = text_of("one.kept_weight", program), text_of("one.implant0_weight", program)
    assert "<one.kept_weight 12x8x3x3>" in kept[0]
    assert "<one.implant0_weight 4x8x1x1>, <one.implant0_bias 4>" in implant[0]
    (joined,) = (node for node in program.graph.nodes if node.name == "conv2d_1")
    assert joined.target is torch.ops.aten.cat.default
    assert len(joined.args[0]) == 2
    assert not text_of("slice", program)
    assert relative_error(program(X), before) < 0.5
    saved = 4 * 8 * 8 * 64  # outputs, inputs, taps saved, positions
    assert cost(program).macs == dense.macs - saved
    (told,) = outcome.details["implants"]
    assert (told["layer"], told["kind"], told["outputs"]) == ("one.weight", "pointwise", 4)
    assert 0 < told["unexplained"] < 1


def test_units_that_stay_are_computed_as_before() -> None:
    program = planned({"one.weight:0": (0, 5, 6, 11)})
    weight = program.tensor("one.weight").detach().clone()
    ImplantLowRank(kind="pointwise")(program, CONTEXT)
    kept = [unit for unit in range(16) if unit not in (0, 5, 6, 11)]
    assert torch.equal(program.tensor("one.kept_weight"), weight[kept])
    assert program.get(REMOVED).kept["conv2d_1"][1].tolist() == [*kept, 0, 5, 6, 11]


def test_a_whole_layer_becomes_two_thin_ones() -> None:
    program = planned({"one.weight:0": tuple(range(16))}, kinds={"one.weight": "low-rank:16"})
    skipped = ImplantLowRank()(program, CONTEXT)
    assert skipped.changes == 0
    (skip,) = skipped.skips
    assert "cheaper" in skip.reason
    program = planned({"one.weight:0": tuple(range(16))}, kinds={"one.weight": "low-rank:5"})
    assert ImplantLowRank()(program, CONTEXT).changes == 1
    assert not text_of("cat", program)
    assert program.tensor("one.implant0_weight").shape == (5, 8, 3, 3)
    assert program.tensor("one.implant1_weight").shape == (16, 5, 1, 1)


def test_units_of_a_padded_stream_are_interleaved_by_slices() -> None:
    groups = find_groups(planned({}))
    (stream,) = (group for group in groups if group.name == "stem.weight:0")
    (outer,) = (group for group in groups if group.name == "two.weight:0")
    plan = {stream.name: (1, 4), outer.name: (0, 2, 7)}
    program = planned(plan, kinds={"two.weight": "low-rank:3"})
    before = program(X)
    outcome = ImplantLowRank()(program, CONTEXT)
    assert outcome.changes == 2
    assert text_of("two.kept_weight 11x", program)
    assert relative_error(program(X), before) < 0.6


@pytest.mark.parametrize("kind", ["pointwise", "depthwise", "pair", "low-rank"])
def test_what_comes_later_works(kind: Any, tmp_path: Path) -> None:
    program = planned({"one.weight:0": (2, 3, 8, 9, 10, 11, 12, 15)})
    context = replace(CONTEXT, dense=program.copy())
    outcome = ImplantLowRank(kind=kind)(program, context)
    assert outcome.changes == 1
    free = [group for group in find_groups(program) if group.frozen_because is None]
    assert sum(len(group.units) for group in free if "norm1." in group.name) == 16
    RecalibrateNorms()(program, context)
    Finetune(epochs=1, batch_size=8)(program, context)
    save(program, tmp_path / "model.pt2")
    again = load(tmp_path / "model.pt2")
    assert_same(again(X), program.eval()(X))
    assert FoldBatchNorm()(program, CONTEXT).changes == 3
    with torch.no_grad():
        assert relative_error(program(X), again(X)) < 1e-4
    export_onnx(program, tmp_path / "model.onnx")
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "Concat" in operators
    assert not {"Gather", "GatherElements", "GatherND", "ScatterND", "ScatterElements"} & operators
    assert relative_error(run_onnx(tmp_path / "model.onnx")((X,)), program(X).detach()) < 1e-4


@pytest.mark.parametrize(
    ("units", "kind"), [(range(8, 16), "pointwise"), (range(16), "low-rank:5")]
)
def test_implants_are_reconstructed_and_quantised(units: Any, kind: str, tmp_path: Path) -> None:
    program = planned({"one.weight:0": (), "two.weight:0": ()})
    dense = program.copy()
    program.put(
        PLAN,
        Plan({"stem.weight:0": (3,)}, {"one.weight:0": tuple(units)}, kinds={"one.weight": kind}),
    )
    context = replace(CONTEXT, dense=dense)
    for step in (RemoveChannels(), RecalibrateNorms(), Reconstruct(batch_size=8)):
        step(program, context)
    assert ImplantLowRank()(program, context).changes == 1
    RecalibrateNorms()(program, context)
    before = (program(X) - dense(X)).square().mean()
    done = Reconstruct(batch_size=8)(program, context)
    assert done.changes
    assert (program(X) - dense(X)).square().mean() < before
    assert all("to compare its output with" in skip.reason for skip in done.skips)
    finish = (
        Finetune(epochs=1, batch_size=8, lr=1e-4), FoldBatchNorm(), InsertObservers(measure=False),
        TrainQuantized(epochs=1), ConvertQuantized(),
    )  # fmt: skip
    for later in finish:
        later(program, context)
    assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    export_onnx(program, tmp_path / "model.onnx")
    with torch.no_grad():
        assert relative_error(run_onnx(tmp_path / "model.onnx")((X,)), program(X)) < 0.05


def test_implants_of_linear_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 4))
    names = {"1.weight:0": tuple(range(6, 24))}
    program = planned(names, model, kinds={"1.weight": "low-rank:4"})
    assert ImplantLowRank()(program, CONTEXT).changes == 1
    assert program.tensor("1.kept_weight").shape == (6, 192)
    assert program.tensor("1.implant0_weight").shape == (4, 192)
    assert program.tensor("1.implant1_weight").shape == (18, 4)
    assert program(X[:5]).shape == (5, 4)


def test_removal_comes_first() -> None:
    program = planned({"one.weight:0": (0, 5)})
    program.put(PLAN, Plan({"one.weight:0": (3,)}, {"one.weight:0": (0, 5)}))
    with pytest.raises(PreconditionError, match="run remove-channels first"):
        ImplantLowRank()(program, CONTEXT)
    RemoveChannels()(program, CONTEXT)
    ImplantLowRank(kind="pointwise")(program, CONTEXT)
    assert program.get(REMOVED).kept["conv2d_1"][1].tolist()[-2:] == [0, 5]
    assert program.tensor("one.kept_weight").shape[0] == 13


def skips_of(model: nn.Module, name: str, units: tuple[int, ...]) -> tuple[Outcome, list[str]]:
    outcome = ImplantLowRank()(planned({name: units}, model), CONTEXT)
    return outcome, [skip.reason for skip in outcome.skips]


def test_declines_depthwise_and_shared_layers() -> None:
    depthwise = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    _, reasons = skips_of(depthwise, "0.weight:0", (1, 2))
    assert any("grouped convolution" in reason for reason in reasons)
    mix = nn.Conv2d(8, 8, 3, padding=1)
    shared = nn.Sequential(nn.Conv2d(3, 8, 1), mix, nn.ReLU(), mix, nn.Conv2d(8, 4, 1))
    _, reasons = skips_of(shared, "0.weight:0", (1, 2))
    assert any("shared" in reason for reason in reasons)


def test_a_plan_of_another_program_is_refused_and_one_without_implants_does_nothing() -> None:
    with pytest.raises(PreconditionError, match="plan again"):
        ImplantLowRank()(planned({"no.weight:0": (1,)}), CONTEXT)
    program = planned({})
    assert ImplantLowRank()(program, Context()).changes == 0
    assert PLAN.name in program.facts
