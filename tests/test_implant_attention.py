from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from support import assert_same, relative_error, trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.graph.cost import cost
from fxprune.graph.program import Program
from fxprune.graph.serialize import load, save
from fxprune.implants.attention_ranks import (
    change_inputs,
    change_outputs,
    measure_heads,
    score_basis,
    value_basis,
)
from fxprune.implants.attention_sites import Projection, attentions
from fxprune.onnx.export import export_onnx
from fxprune.passes import (
    ConvertQuantized,
    Finetune,
    FoldBatchNorm,
    ImplantAttention,
    InsertObservers,
    Reconstruct,
    TrainQuantized,
)
from fxprune.pipeline.context import Context
from fxprune.training.evaluate import run_onnx

X = torch.randn(24, 6, 16, generator=torch.Generator().manual_seed(0))
SAMPLES = Arrays(X, torch.arange(24) % 4)
CONTEXT = Context(Data(SAMPLES, SAMPLES, SAMPLES))


class Attend(nn.Module):
    """Self-attention as models write it, with one in-projection or three."""

    def __init__(self, heads: int = 2, *, fused: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        if fused:
            self.qkv = nn.Linear(16, 48, bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(16, 16, bias=bias) for _ in range(3))
        self.proj = nn.Linear(16, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        if self.fused:
            made = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
            q, k, v = made.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            shape = (batch, tokens, self.heads, width // self.heads)
            q, k, v = (one(x).view(shape).transpose(1, 2) for one in (self.q, self.k, self.v))
        q, k = self.between(q), self.between(k)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))  # type: ignore[no-any-return]

    def between(self, x: Tensor) -> Tensor:
        """Do what comes between a projection and attention."""
        return x


class Model(nn.Module):
    """A transformer's block and a head."""

    def __init__(self, attend: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(16), attend or Attend()
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm(x))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def build(model: nn.Module, dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return trace(model.to(dtype).eval(), X[:2].to(dtype))


def parts(program: Program) -> tuple[Any, Any]:
    (found,) = attentions(program)
    projections = (found.query, found.key, found.value, found.out)
    assert all(isinstance(part, Projection) for part in projections)
    return found, projections


def double(x: Tensor = X) -> Context:
    samples = Arrays(x.double(), torch.arange(len(x)) % 4)
    return Context(Data(samples, samples, samples))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_full_rank_changes_nothing(fused: bool, bias: bool) -> None:
    program = build(Model(Attend(fused=fused, bias=bias)))
    expected = program(X)
    found, (query, key, value, out) = parts(program)
    moments = measure_heads(program, [found], CONTEXT, 24, 8)
    name = found.node.name
    scores = score_basis(moments[name, "query"], moments[name, "key"])
    columns = program.tensor(out.weight)[:, out.places].transpose(0, 1)
    values = value_basis(moments[name, "out"], columns, centred=bias)
    change_outputs(program, query, scores.first)
    change_outputs(program, key, scores.second)
    change_outputs(program, value, values.first)
    change_inputs(program, out, values.second)
    assert relative_error(program(X), expected) < 1e-5
    eye = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
    assert relative_error(scores.first.transpose(1, 2) @ scores.second, eye) < 1e-6
    assert relative_error(values.second.transpose(1, 2) @ values.first, eye) < 1e-6


def test_the_error_of_scores_is_the_sum_of_the_discarded_squares() -> None:
    program = build(Attend(), torch.float64)
    found, (query, key, *_) = parts(program)
    moments = measure_heads(program, [found], double(), 24, 8)
    name = found.node.name
    basis = score_basis(moments[name, "query"], moments[name, "key"])
    flat = X.double().flatten(0, 1)
    made = {}
    for part in (query, key):
        weight, bias = program.tensor(part.weight), program.tensor(str(part.bias))
        made[part] = F.linear(flat, weight, bias)[:, part.places].transpose(0, 1)  # h, tokens, d
    keys = made[key] - made[key].mean(1, keepdim=True)
    for rank in (1, 3, 7):
        few = (basis.first[:, :rank].transpose(1, 2), basis.second[:, :rank].transpose(1, 2))
        left = made[query] @ keys.transpose(1, 2)
        right = (made[query] @ few[0]) @ (keys @ few[1]).transpose(1, 2)
        assert_same((left - right).square().mean((1, 2)), basis.squares[:, rank:].sum(1))
        best = torch.linalg.svdvals(left)[:, rank:].square().sum(1) / left[0].numel()
        assert_same((left - right).square().mean((1, 2)), best)


@pytest.mark.parametrize("bias", [True, False])
def test_the_error_of_values_is_the_sum_of_the_discarded_squares(bias: bool) -> None:
    program = build(Attend(heads=1, fused=False, bias=bias), torch.float64)
    expected = program(X.double())
    outcome = ImplantAttention(rank=0.25, products="value", round_to=1)(program, double())
    assert outcome.changes == 1
    (told,) = outcome.details["products"]
    assert (told["product"], told["rank"], told["of"]) == ("value", 4, 16)
    error = (program(X.double()) - expected).square().sum(-1).mean()
    again = build(Attend(heads=1, fused=False, bias=bias), torch.float64)
    found, (_, _, _, out) = parts(again)
    moments = measure_heads(again, [found], double(), 24, 8)[found.node.name, "out"]
    columns = again.tensor(out.weight)[:, out.places].transpose(0, 1)
    assert_same(error, value_basis(moments, columns, centred=bias).squares[:, 4:].sum())


@pytest.mark.parametrize("fused", [True, False])
def test_heads_are_narrowed_and_the_scale_stays(fused: bool, tmp_path: Path) -> None:
    program = build(Model(Attend(fused=fused)))
    dense, before = program.copy(), cost(program)
    outcome = ImplantAttention(rank=0.5, round_to=2)(program, CONTEXT)
    assert (outcome.changes, outcome.skips) == (2, ())
    (found,) = attentions(program)
    assert found.node.kwargs["scale"] == pytest.approx(8**-0.5)
    assert [tuple(a.meta["val"].shape) for a in found.node.args[:3]] == [(2, 2, 6, 4)] * 3  # type: ignore[union-attr]
    assert program.tensor("attend.proj.weight").shape == (16, 8)
    in_weights = ("qkv",) if fused else ("q", "k", "v")
    assert sum(len(program.tensor(f"attend.{name}.weight")) for name in in_weights) == 24
    assert cost(program).macs < before.macs
    names = {node.name for node in dense.graph.nodes}
    assert {found.node.name, found.query.call.name, found.value.call.name}.isdisjoint(names)  # type: ignore[union-attr]
    error = relative_error(program(X), dense(X))
    assert error < 0.3
    program.verify()
    export_onnx(program, tmp_path / "model.onnx")
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert not {"ScatterND", "ScatterElements", "GatherElements", "GatherND"} & operators
    assert relative_error(run_onnx(tmp_path / "model.onnx")((X,)), program(X).detach()) < 1e-5
    second = ImplantAttention(rank=1.0)(program, CONTEXT)
    assert second.changes == 0


def test_a_product_of_low_rank_is_found_and_cut_without_loss() -> None:
    attend = Attend(fused=False)
    program = build(Model(attend))
    with torch.no_grad():
        key = program.tensor("attend.k.weight").view(2, 8, 16)
        key[:, 3:] = 0.5 * key[:, :3].repeat(1, 2, 1)[:, :5]
        bias = program.tensor("attend.k.bias").view(2, 8)
        bias[:, 3:] = 0.5 * bias[:, :3].repeat(1, 2)[:, :5]
    expected = program(X)
    outcome = ImplantAttention(unexplained=1e-9, round_to=1)(program, CONTEXT)
    assert outcome.changes == 1
    assert outcome.details["products"][0]["rank"] == 3
    assert relative_error(program(X), expected) < 1e-4


def test_what_comes_later_works(tmp_path: Path) -> None:
    program = build(Model())
    context = replace(CONTEXT, dense=program.copy())
    dense = program(X)
    ImplantAttention(rank=0.5, round_to=2)(program, context)
    before = (program(X) - dense).square().mean()
    done = Reconstruct(samples=24, batch_size=8)(program, context)
    assert (program(X) - dense).square().mean() <= before
    assert {skip.node for skip in done.skips} == {node.name for node in _makers(program)}
    Finetune(epochs=1, batch_size=8, lr=1e-4)(program, context)
    save(program, tmp_path / "model.pt2")
    assert_same(load(tmp_path / "model.pt2")(X), program.eval()(X))
    for step in (
        FoldBatchNorm(),
        InsertObservers(measure=False),
        TrainQuantized(epochs=1),
        ConvertQuantized(),
    ):
        step(program, context)
    export_onnx(program, tmp_path / "model.onnx")
    assert relative_error(run_onnx(tmp_path / "model.onnx")((X,)), program(X).detach()) < 0.05


def _makers(program: Program) -> list[Any]:
    found = attentions(program)[0]
    return [found.query.call]  # type: ignore[union-attr]


class Rotary(Attend):
    def between(self, x: Tensor) -> Tensor:
        return torch.mul(x, torch.arange(6.0).cos().unsqueeze(1))


class Grouped(Attend):
    def between(self, x: Tensor) -> Tensor:
        return x[:, :1].expand(-1, 2, -1, -1)


class Beside(Attend):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(super().forward(x), self.qkv(x)[..., :16])


class Written(Attend):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.view(*x.shape[:2], 2, 8).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        shares = F.dropout((q @ k.transpose(2, 3) / 8).softmax(-1), 0.1, self.training)
        return torch.add(self.proj((shares @ v).transpose(1, 2).flatten(2)), x)


@pytest.mark.parametrize(
    ("attend", "product", "reason"),
    [
        (Rotary(), "query-key", "lies between it and a linear layer"),
        (Grouped(), "query-key", "several heads share"),
        (Beside(), "value", "shared with another layer"),
        (Attend(), "value", "have to shrink too"),
        (Written(), "both", "written out"),
    ],
)
def test_declines(attend: nn.Module, product: str, reason: str) -> None:
    program = build(Model(attend))
    expected = program(X)
    outcome = ImplantAttention(rank=0.5, round_to=2, products=product)(program, CONTEXT)  # type: ignore[arg-type]
    assert outcome.changes == 0
    (skip,) = outcome.skips
    assert reason in skip.reason
    assert torch.equal(program(X), expected)
