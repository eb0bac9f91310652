from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support import randomise_norms, trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.errors import InputError
from fxprune.graph.cost import cost
from fxprune.graph.facts import PLAN, SENSITIVITY, Sensitivity
from fxprune.graph.program import Program
from fxprune.implants.evaluation import Trials
from fxprune.implants.fits import fit
from fxprune.implants.implant_types import Kind
from fxprune.implants.low_rank_layers import ranks_of, spectrum, with_layers
from fxprune.implants.moments import Sampling, measure
from fxprune.implants.planning import implant_share
from fxprune.implants.sites import output_scale, sites_of
from fxprune.passes import (
    ImplantLowRank,
    PlanChannels,
    RecalibrateNorms,
    Reconstruct,
    RemoveChannels,
)
from fxprune.pipeline.context import Context
from fxprune.planning.cost_evaluator import Ledger
from fxprune.planning.cost_model import cost_model
from fxprune.planning.problem import Problem
from fxprune.planning.widths import Rounding
from fxprune.structure.groups import find_groups

X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SAMPLES = Arrays(X, torch.arange(24) % 4)
CONTEXT = Context(Data(SAMPLES, SAMPLES, SAMPLES))
ALL = Sampling(24, 8, 10**9)


class Block(nn.Module):
    """A residual block: a stream of 16 channels, an inner layer of 24."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.one, self.norm1 = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.two, self.norm2 = nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.norm1(self.one(x)))
        return self.head(F.relu(self.norm2(self.two(y)) + x).mean((2, 3)))  # type: ignore[no-any-return]


def scored(level: float = 1.0) -> Program:
    torch.manual_seed(0)
    block = Block()
    randomise_norms(block).eval()
    with torch.no_grad():  # most of what the inner layers compute has few dimensions
        for layer in (block.one, block.two):
            left, values, right = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
            values[4:] *= 0.1
            layer.weight.copy_(((left * values) @ right).view_as(layer.weight))
    program = trace(block, X[:2])
    scores = {
        group.name: level * (1 + torch.arange(len(group.units), dtype=torch.float64))
        for group in find_groups(program)
        if group.frozen_because is None
    }
    program.put(SENSITIVITY, Sensitivity("test", scores))
    return program


@pytest.mark.parametrize("ratio", ["auto", 0.4, 1.0])
@pytest.mark.parametrize("target", [0.8, 0.5])
def test_the_costs_are_those_predicted(ratio: float | str, target: float) -> None:
    program = scored()
    dense = cost(program)
    step = PlanChannels(macs=target, round_to=2, implant_ratio=ratio, tolerance=0.05)
    outcome = step(program, CONTEXT)
    plan = program.get(PLAN)
    assert plan.kinds
    RemoveChannels()(program, CONTEXT)
    done = ImplantLowRank(samples=24)(program, CONTEXT)
    assert done.changes == len(plan.kinds)
    assert cost(program).macs == round(plan.predicted["macs"])
    assert cost(program).macs <= target * dense.macs
    assert outcome.details["implants"] == plan.kinds
    program.verify()


def test_parameters_and_bytes_are_predicted_too() -> None:
    for ratio in ("auto", 0.5):
        program = scored()
        PlanChannels(params=0.6, size=0.6, round_to=2, implant_ratio=ratio)(program, CONTEXT)
        predicted = program.get(PLAN).predicted
        RemoveChannels()(program, CONTEXT)
        ImplantLowRank(samples=24)(program, CONTEXT)
        found = cost(program)
        assert (found.params, found.weight_bytes) == (
            round(predicted["params"]), round(predicted["weight_bytes"])
        )  # fmt: skip


MEND = RecalibrateNorms(), Reconstruct()


@torch.no_grad()
def test_plans_are_judged_once_mended() -> None:
    program = scored()
    recovering = replace(CONTEXT, recovery=MEND)
    PlanChannels(macs=0.6, round_to=2, implant_ratio="auto", tolerance=0.05)(program, recovering)
    mixed, small = program.get(PLAN), scored()
    assert mixed.kinds
    PlanChannels(macs=0.6, round_to=2, tolerance=0.05)(small, CONTEXT)
    alone = small.get(PLAN)
    groups = find_groups(program)
    sites, _ = sites_of(program, {group: range(len(group.units)) for group in groups})
    moments = measure(program, sites, CONTEXT, ALL)
    trials = Trials(program, groups, moments, recovering, 6, 3)
    assert trials.moved(mixed) < trials.moved(alone)

    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(CONTEXT.seed))
    judges, others = X[chosen[:6]], X[chosen[6:]]
    RemoveChannels()(small, CONTEXT)
    cut = (small(judges) - program(judges)).square().mean()
    for step in MEND:
        step(small, Context(Data(Arrays(others)), dense=program))
    once_mended = (small(judges) - program(judges)).square().mean()
    assert trials.moved(alone) == pytest.approx(float(once_mended), rel=1e-4)
    assert once_mended < 0.8 * cut


def test_a_fixed_ratio_splits_every_cut_as_the_paper_does() -> None:
    program = scored()
    PlanChannels(macs=0.7, round_to=2, implant_ratio=0.5, tolerance=0.05)(program, CONTEXT)
    plan = program.get(PLAN)
    assert plan.implant
    scores = program.get(SENSITIVITY).scores
    for name, units in plan.implant.items():
        removed = plan.remove.get(name, ())
        assert abs(len(units) - len(removed)) <= 1
        order = scores[name].argsort().tolist()
        assert sorted(removed) == order[: len(removed)]
        assert sorted(units) == order[len(removed) : len(removed) + len(units)]


def test_no_ratio_is_removal_alone() -> None:
    plain, none = scored(), scored()
    PlanChannels(macs=0.7)(plain, CONTEXT)
    PlanChannels(macs=0.7, implant_ratio=0.0)(none, CONTEXT)
    assert plain.get(PLAN) == none.get(PLAN)
    assert not plain.get(PLAN).kinds


def layers_of(program: Program) -> Any:
    groups = [group for group in find_groups(program) if group.frozen_because is None]
    sites, _ = sites_of(program, {group: range(len(group.units)) for group in groups})
    moments = measure(program, sites, CONTEXT, ALL)
    spectra = {site.node.name: spectrum(program, site, moments[site.node.name]) for site in sites}
    scores = program.get(SENSITIVITY).scores
    by_unit = {group: scores[group.name].numpy() for group in groups}
    found = ranks_of(sites, spectra, by_unit, Rounding(1, 4).ladder())
    return groups, moments, spectra, by_unit, found


def test_the_loss_of_a_rank_is_what_its_fit_leaves_unexplained() -> None:
    program = scored()
    groups, moments, _, by_unit, layers = layers_of(program)
    (inner,) = (group for group in groups if group.name == "one.weight:0")
    (layer,) = (layer for layer in layers if layer.site.weight == "one.weight")
    weight, scale = program.tensor("one.weight"), output_scale(program, layer.site)
    for choice in (1, 4, 9):
        kind = Kind("low-rank", int(layer.ranks[choice]))
        name = layer.site.node.name
        implant = fit(layer.site, weight, None, moments[name], kind, scale=scale)
        expected = float((implant.unexplained.numpy() * by_unit[inner]).sum())
        np.testing.assert_allclose(layer.losses[choice], expected, rtol=1e-6)


def test_the_full_loss_of_a_stream_is_shared_out_to_its_layers() -> None:
    program = scored()
    _, _, _, by_unit, layers = layers_of(program)
    stream = [layer for layer in layers if layer.site.weight in ("stem.weight", "two.weight")]
    (scores,) = (own for group, own in by_unit.items() if group.name == "stem.weight:0")
    ranks = {layer.site.weight: layer for layer in stream}
    assert set(ranks) == {"stem.weight", "two.weight"}
    assert sum(layer.losses.max() for layer in stream) < scores.sum()
    assert all((np.diff(layer.losses) >= -1e-12).all() for layer in stream)


def test_changes_are_differences_of_values() -> None:
    program = scored()
    groups, _, _, _, layers = layers_of(program)
    losses = tuple(np.arange(len(group.units), dtype=float) for group in groups)
    levels = (tuple(np.arange(len(group.units)) for group in groups),)
    model = cost_model(program, groups)
    ledger = Ledger.of(model, ["macs"])
    problem = Problem(model_names(groups), ledger, np.array([1.0]), losses, levels, ("1",))
    wide = with_layers(program, problem, model, layers)
    rng = np.random.default_rng(0)
    one = rng.integers(0, wide.sizes)[None]
    numbers, counts = np.array([0, len(groups)]), np.array([2, 3])
    changed = wide.costs.changes(one[0], numbers, counts)
    for row, (number, count) in enumerate(zip(numbers, counts, strict=True)):
        after = one[0].copy()
        after[number] = count
        difference = wide.costs.values(after[None]) - wide.costs.values(one[:1])
        np.testing.assert_allclose(changed[row], difference[0])


def model_names(groups: Any) -> tuple[str, ...]:
    return tuple(group.name for group in groups)


def test_the_option_is_auto_or_a_share() -> None:
    assert implant_share("auto") is None
    assert implant_share(0.5) == 0.5
    for wrong in ("half", 1.5):
        with pytest.raises(InputError, match="must be auto or a number between 0 and 1"):
            PlanChannels(macs=0.5, implant_ratio=wrong)
