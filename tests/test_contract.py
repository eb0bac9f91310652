"""What every pass owes, with no code of its own; a new pass is tried by being in ``passes.ALL``."""

from __future__ import annotations

import inspect
import pickle
import re
import sys
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from support import randomise_norms, trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import passes
from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.errors import PreconditionError
from fxprune.graph.program import Program
from fxprune.graph.text import graph_text
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


@pytest.mark.parametrize("model", MODELS)
@every_pass
def test_runs_and_is_then_idle(step: type[Pass], model: str) -> None:
    program, context = stock(model)
    for earlier in before(step):
        earlier(program, context)
    kept = {name: program.facts[name] for name in program.facts}
    text = graph_text(program)
    outcome = quick(step)(program, context)
    program.verify()
    assert all(fact.name in program.facts for fact in step.gives) or not outcome.changes
    assert all(skip.node and skip.reason for skip in outcome.skips)
    moved = graph_text(program)
    if moved != text:
        assert outcome.changes > 0
        assert step.acts
    if moved != text and step.needs <= step.keeps | step.gives:
        assert quick(step)(program, context).changes == 0
        assert graph_text(program) == moved
    survivors = {fact.name for fact in step.keeps | step.gives}
    gone = {name for name in kept if name not in program.facts}
    assert bool(gone) <= bool(outcome.changes)
    assert gone.isdisjoint(survivors)
