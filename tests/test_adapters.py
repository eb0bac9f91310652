from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from support import assert_same, randomise_norms, trace
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult  # noqa: TID251  # what is adapted to
from torch.fx.passes.infra.pass_manager import PassManager  # noqa: TID251

from fxprune.errors import InputError, PostconditionError
from fxprune.graph.program import Fact, Program
from fxprune.passes.fold_batchnorm import FoldBatchNorm
from fxprune.pipeline.adapters import as_fx_pass, from_function
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass
from fxprune.pipeline.driver import Pipeline

aten = torch.ops.aten
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
COUNT: Fact[int] = Fact("count")


def network() -> nn.Module:
    return randomise_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))


@dataclass(frozen=True)
class Count(Pass):
    name: ClassVar[str] = "count"
    acts: ClassVar[bool] = False
    gives: ClassVar[Facts] = frozenset({COUNT})

    def run(self, program: Program, context: Context) -> Outcome:
        program.put(COUNT, len(program.graph.nodes))
        return Outcome()


@dataclass(frozen=True)
class Recall(Pass):
    name: ClassVar[str] = "recall"
    needs: ClassVar[Facts] = frozenset({COUNT})

    def run(self, program: Program, context: Context) -> Outcome:
        return Outcome(0, details={"count": program.get(COUNT)})


def test_a_pass_runs_in_the_pass_manager_of_torch() -> None:
    program = trace(network(), X)
    expected = program(X)
    manager = PassManager([as_fx_pass(FoldBatchNorm())])
    result = manager(program.graph_module)
    assert result.modified
    assert aten.batch_norm.default not in {n.target for n in result.graph_module.graph.nodes}
    assert_same(result.graph_module(X), expected)
    assert not manager(result.graph_module).modified


def test_facts_travel_between_passes_like_one_program() -> None:
    program = trace(network(), X)
    steps = [as_fx_pass(step, like=program) for step in (Count(), Recall())]
    PassManager(steps)(program.graph_module)
    assert program.get(COUNT) == len(program.graph.nodes)
    with pytest.raises(Exception, match="the 'recall' pass"):
        PassManager([as_fx_pass(Recall())])(program.graph_module)


def test_a_graph_without_shapes_is_refused() -> None:
    with pytest.raises(InputError, match="the input input_1 has no recorded shape"):
        as_fx_pass(FoldBatchNorm())(fx.symbolic_trace(network()))


def drop_relus(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.target is aten.relu.default:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def test_a_function_runs_in_a_pipeline() -> None:
    model = network()
    program = trace(model, X)
    report = Pipeline([FoldBatchNorm(), from_function(drop_relus)]).run(program)
    assert [entry.spec for entry in report.entries] == ["fold-batchnorm", "drop-relus"]
    assert report.entries[1].outcome.changes == 2  # the call, and the output that read it
    assert_same(program(X), model[:2].eval()(X))  # type: ignore[index]


def test_a_functions_result_says_what_changed() -> None:
    def another(module: fx.GraphModule) -> PassResult:
        return PassResult(fx.GraphModule(module, module.graph), True)

    context = Context()
    assert from_function(another)(trace(network(), X), context).changes == 1
    assert from_function(lambda module: 7, "seven")(trace(network(), X), context).changes == 7
    assert from_function(lambda module: module, "same")(trace(network(), X), context).changes == 0
    assert str(from_function(lambda module: None, "My step!")) == "my-step"


def test_a_function_that_breaks_the_graph_is_found_out() -> None:
    def wrong(module: fx.GraphModule) -> None:
        for node in module.graph.nodes:
            if node.target is aten.conv2d.default:
                node.args = (*node.args[:3], [2, 2])

    with pytest.raises(PostconditionError, match="conv2d was recorded with"):
        from_function(wrong)(trace(network(), X), Context())
