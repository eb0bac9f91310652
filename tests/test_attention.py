"""Whole heads, or the same positions in every head: attention loses either exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import trace
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.graph.facts import Preference, Slot
from fxprune.passes import AnnotateSensitivity, PlanChannels, RemoveChannels
from fxprune.pipeline.context import Context


class Attention(nn.Module):
    """Self-attention from one projection, as most vision transformers have it."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return result


@pytest.mark.parametrize(("prefer", "units"), [("heads", 3), ("head_dim", 8)])
def test_heads_or_head_widths_can_go(prefer: str, units: int) -> None:
    program = trace(Attention().double(), torch.randn(2, 7, 24, dtype=torch.float64))
    groups = [g for g in fxprune.find_groups(program, prefer) if g.frozen_because is None]  # type: ignore[arg-type]
    assert sorted({len(group.units) for group in groups}) == [units]
    found = fxprune.verify_removal(program, {group: [1] for group in groups})
    assert found.error is not None
    assert found.error <= 1e-10


def test_the_attention_scale_stays_when_head_width_shrinks() -> None:
    program = trace(Attention(), torch.randn(2, 7, 24))
    groups = [g for g in fxprune.find_groups(program, "head_dim") if g.frozen_because is None]
    fxprune.remove_units(program, {group: [0, 1] for group in groups})
    (node,) = [n for n in program.graph.nodes if "attention" in str(n.target)]
    assert node.kwargs["scale"] == pytest.approx(8**-0.5)


class TalkingHeads(Attention):
    """Scores and weights are mixed over heads (arXiv 2003.02436), as CaiT has it."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__(width, heads)
        self.before = nn.Linear(heads, heads)
        self.after = nn.Linear(heads, heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * 8**-0.5) @ k.transpose(-2, -1)
        scores = self.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        weights = self.after(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        result: Tensor = self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        return result


class CrossCovariance(Attention):
    """Attention among the channels of a head (arXiv 2106.09681), as XCiT has it."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1)
        result: Tensor = self.out((weights @ v).permute(0, 3, 1, 2).reshape(batch, tokens, width))
        return result


@pytest.mark.parametrize("prefer", ["heads", "head_dim"])
def test_heads_that_talk_are_removed_exactly(prefer: Preference) -> None:
    program = trace(TalkingHeads().double(), torch.randn(2, 7, 24, dtype=torch.float64))
    groups = [g for g in fxprune.find_groups(program, prefer) if g.frozen_because is None]
    # Those of queries and values, and those between the two mixtures.
    units = [3, 3] if prefer == "heads" else [3, 8]
    assert sorted(len(group.units) for group in groups) == units
    found = fxprune.verify_removal(program, {group: [1] for group in groups})
    assert found.error is not None
    assert found.error <= 1e-10


def test_heads_of_cross_covariance_attention_go_whole() -> None:
    program = trace(CrossCovariance().double(), torch.randn(2, 7, 24, dtype=torch.float64))
    (group,) = [g for g in fxprune.find_groups(program) if g.frozen_because is None]
    assert len(group.units) == 3
    found = fxprune.verify_removal(program, {group: [2]})
    assert found.error is not None
    assert found.error <= 1e-10


@pytest.mark.parametrize("attention", ["heads", "head_dim"])
def test_a_run_chooses_what_goes(attention: Preference) -> None:
    program = trace(Attention(), torch.randn(2, 7, 24))
    context = Context(dense=program.copy())
    steps: tuple[Any, ...] = (
        AnnotateSensitivity("magnitude-l2", attention=attention),
        PlanChannels(params="70%", round_to=1, tolerance=0.2),
        RemoveChannels(),
    )
    for step in steps:
        step(program, context)
    (scores,) = [node for node in program.graph.nodes if "attention" in str(node.target)]
    _, heads, _, width = scores.meta["val"].shape
    assert (width == 8 and heads < 3) if attention == "heads" else (heads == 3 and width < 8)


class MultiQuery(nn.Module):
    """Several query heads read one head of keys and values, which has no dimension for heads."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width // heads)
        self.value = nn.Linear(width, width // heads)
        self.out = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (layer(x).unsqueeze(1) for layer in (self.key, self.value))
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        result: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return result


@pytest.mark.parametrize(("prefer", "units"), [("heads", [3]), ("head_dim", [8, 8])])
def test_one_head_of_keys_and_values(prefer: Preference, units: list[int]) -> None:
    program = trace(MultiQuery().double(), torch.randn(2, 7, 24, dtype=torch.float64))
    groups = [g for g in fxprune.find_groups(program, prefer) if g.frozen_because is None]
    assert [len(group.units) for group in groups] == units
    found = fxprune.verify_removal(program, {group: [0, 2] for group in groups})
    assert found.error is not None
    assert found.error <= 1e-10


class GroupedQuery(nn.Module):
    """Six query heads share two heads of keys and values, three each (arXiv 2305.13245)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.pair, self.out = nn.Linear(24, 24), nn.Linear(24, 16), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (6, 4)).transpose(1, 2)
        k, v = self.pair(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


@pytest.mark.parametrize("prefer", ["heads", "head_dim"])
def test_query_heads_go_with_the_keys_that_they_share(prefer: Preference) -> None:
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    program = trace(GroupedQuery().double(), x)
    groups = [g for g in fxprune.find_groups(program, prefer) if g.frozen_because is None]
    assert [len(group.units) for group in groups] == [2 if prefer == "heads" else 4]
    found = fxprune.verify_removal(program, {group: [0] for group in groups})
    assert found.error is not None
    assert found.error <= 1e-10
    if prefer == "heads":  # the first three query heads, and nothing of the others
        indices = groups[0].places(Slot("query.weight", 0))[1][:12]
        assert sorted(indices.tolist()) == list(range(12))
