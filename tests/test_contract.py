"""What every pass owes, with no code of its own; a new pass is tried by being in ``passes.ALL``."""

from __future__ import annotations

import inspect
import pickle
import re
import sys
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from support import check, randomise_norms, trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import passes
from fxprune.data.batches import batches
from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.errors import PreconditionError
from fxprune.graph.program import Program
from fxprune.passes import (
    AnnotateSensitivity,
    ApplyPlan,
    ConvertQuantized,
    Finetune,
    FoldBatchNorm,
    ImplantAttention,
    ImplantLowRank,
    InsertObservers,
    PlanChannels,
    RecalibrateNorms,
    Reconstruct,
    RemoveBlocks,
    RemoveChannels,
    Sparsify,
    TrainQuantized,
)
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Pass
from fxprune.pipeline.driver import Pipeline
from fxprune.pipeline.text import parse

# Options that make a pass quick on the stock models, or that it cannot do without.
QUICK: dict[str, dict[str, Any]] = {
    "annotate-sensitivity": {"criterion": "magnitude-l2"},
    "remove-blocks": {"macs": "100%"},
    "plan-channels": {"params": "70%", "round_to": 1, "tolerance": 0.1},
    "finetune": {"epochs": 1, "batch_size": 8},
}


class Residual(nn.Module):
    """Convolutions, batch norms, a depthwise layer, a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depth, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.mix, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.mix(F.relu6(self.norm2(self.depth(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """One transformer block over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(24, 16)
        self.block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.transpose(1, 2).flatten(2))
        return self.head(self.block(tokens).mean(1))  # type: ignore[no-any-return]


def plain() -> nn.Module:
    """A perceptron."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(24, 4),
    )  # fmt: skip


MODELS = {"residual": Residual, "attention": Attention, "plain": plain}
every_pass = pytest.mark.parametrize("step", passes.ALL, ids=[step.name for step in passes.ALL])


def quick(step: type[Pass]) -> Pass:
    return step(**QUICK.get(step.name, {}))


def stock(name: str) -> tuple[Program, Context]:
    torch.manual_seed(0)
    x, y = torch.randn(24, 3, 8, 8), torch.arange(24) % 4
    program = trace(randomise_norms(MODELS[name]()), x[:2])
    samples = Arrays(x, y)
    return program, Context(Data(samples, samples, samples), dense=program.copy())


def inputs(context: Context) -> tuple[Any, ...]:
    return next(batches(context.samples.calibration, 2)).inputs


def before(step: type[Pass]) -> list[Pass]:
    """The passes that give what this one needs, in order."""
    found: list[Pass] = []
    for fact in sorted(step.needs, key=lambda fact: fact.name):
        (giver,) = (other for other in passes.ALL if fact in other.gives)
        found += [*before(giver), quick(giver)]
    return [value for number, value in enumerate(found) if value not in found[:number]]


@every_pass
def test_one_name_for_module_and_class_and_pass(step: type[Pass]) -> None:
    module = step.name.replace("-", "_")
    assert step.__module__ == f"fxprune.passes.{module}"
    assert step.__name__.lower() == module.replace("_", "")


@every_pass
def test_is_documented(step: type[Pass]) -> None:
    module = inspect.getdoc(sys.modules[step.__module__]) or ""
    for heading in ("Before", "After"):
        assert re.search(rf"^{heading}\b.*:$", module, re.MULTILINE), heading
    text = inspect.getdoc(step) or ""
    missing = [field.name for field in fields(step) if f"    {field.name}: " not in text]
    assert missing == []


@every_pass
def test_is_a_value(step: type[Pass]) -> None:
    assert is_dataclass(step)
    assert step.__dataclass_params__.frozen  # type: ignore[attr-defined]
    for value in (step(), quick(step)):
        assert pickle.loads(pickle.dumps(value)) == value
        text = str(Pipeline([*before(step), value]))
        assert parse(text, passes.known()).passes[-1] == value


@every_pass
def test_says_what_it_reads(step: type[Pass]) -> None:
    program, context = stock("plain")
    if not step.needs:
        pytest.skip("reads no facts")
    with pytest.raises(PreconditionError, match=min(fact.name for fact in step.needs)):
        quick(step)(program, context)


ANNOTATE, PLAN = quick(AnnotateSensitivity), PlanChannels(**QUICK["plan-channels"])
CUT = (ANNOTATE, PLAN, RemoveChannels())
OBSERVE = InsertObservers(measure=False)


@dataclass(frozen=True)
class Case:
    """A pass on a model where it acts; ``same`` promises the same function afterwards."""

    step: Pass
    model: str
    earlier: tuple[Pass, ...] = ()
    same: bool = False


CASES = [
    Case(ApplyPlan(units={"1.weight:0": (0, 3)}), "plain"),
    Case(RemoveBlocks(macs="90%"), "residual"),
    Case(RemoveBlocks(macs="80%"), "attention"),
    *(Case(ANNOTATE, model, same=True) for model in MODELS),
    *(Case(PLAN, model, (ANNOTATE,), same=True) for model in MODELS),
    *(Case(RemoveChannels(), model, CUT[:2]) for model in MODELS),
    *(
        Case(
            ImplantLowRank(),
            model,
            (ANNOTATE, replace(PLAN, implant_ratio=0.5, round_to=4), RemoveChannels()),
        )
        for model in ("residual", "plain")
    ),
    Case(ImplantAttention(rank=0.5, round_to=1), "attention"),
    *(Case(Sparsify(), model) for model in MODELS),
    *(Case(RecalibrateNorms(), model) for model in ("residual", "plain")),
    *(Case(Reconstruct(), model, CUT) for model in MODELS),
    *(Case(quick(Finetune), model) for model in MODELS),
    *(Case(FoldBatchNorm(), model, same=True) for model in ("residual", "plain")),
    *(Case(OBSERVE, model, (FoldBatchNorm(),), same=True) for model in MODELS),
    *(Case(TrainQuantized(), model, (FoldBatchNorm(), OBSERVE)) for model in MODELS),
    *(
        Case(ConvertQuantized(), model, (FoldBatchNorm(), OBSERVE, TrainQuantized()))
        for model in MODELS
    ),
]


def test_every_pass_has_a_case() -> None:
    assert {type(case.step) for case in CASES} == set(passes.ALL)


@pytest.mark.parametrize("case", CASES, ids=[f"{case.step.name}-{case.model}" for case in CASES])
def test_acts_and_is_then_idle(case: Case) -> None:
    step = case.step
    program, context = stock(case.model)
    for earlier in case.earlier:
        earlier(program, context)
    facts = dict(program.facts)
    outcome = check(step, program, inputs(context), same_function=case.same, context=context)
    program.verify()
    assert (outcome.changes > 0) == step.acts
    assert all(fact.name in program.facts for fact in step.gives)
    assert all(skip.node and skip.reason for skip in outcome.skips)
    gone = {name for name in facts if name not in program.facts}
    assert gone.isdisjoint(fact.name for fact in step.keeps | step.gives)
    assert not gone or step.acts


@pytest.mark.parametrize(
    ("step", "model"),
    [
        (RemoveBlocks(macs="100%"), "residual"),
        (ImplantAttention(rank=0.5), "residual"),
        (RecalibrateNorms(), "attention"),
        (FoldBatchNorm(), "attention"),
        (Finetune(epochs=0), "plain"),
    ],
)
def test_is_idle_where_there_is_nothing_to_do(step: Pass, model: str) -> None:
    program, context = stock(model)
    assert check(step, program, inputs(context), context=context).changes == 0
