from __future__ import annotations

import itertools

import pytest
import torch
from blocks import BLOCKS, Step
from strategies import Design, Network
from support import assert_same, trace
from torch.nn import functional as F

from fxprune import find_groups, remove_units
from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.pipeline.context import Context
from fxprune.sensitivity.gates import GatedProgram
from fxprune.sensitivity.scores import SensitivitySettings, measure


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_closed_gate_is_removal(kind: str) -> None:
    design = Design((Step("conv"), Step(kind, 0, 1, 8), Step("conv", 0, 0, 12)))
    network = Network(design)
    program, x = trace(network, network.example(2)), network.example(3)
    groups = [group for group in find_groups(program) if group.frozen_because is None]
    gated = GatedProgram.of(program, groups)
    with torch.no_grad():
        assert_same(gated.run((x,), torch.ones(3, gated.units).double()), program(x))
        starts = itertools.accumulate((len(group.units) for group in groups), initial=0)
        for group, start in zip(groups, starts, strict=False):
            if group.mixed_by or len(group.units) < 2:
                continue
            values = torch.ones(3, gated.units, dtype=torch.float64)
            values[:, start + 1] = 0
            smaller = program.copy()
            remove_units(smaller, {group: [1]})
            assert_same(gated.run((x,), values), smaller(x))


@pytest.mark.parametrize("kind", ["conv", "attention", "depthwise", "shuffle", "gate"])
def test_a_samples_gates_act_on_that_sample_alone(kind: str) -> None:
    network = Network(Design((Step("conv"), Step(kind, 0, 1, 8), Step("conv", 0, 0, 12))))
    program, x = trace(network, network.example(2)), network.example(3)
    gated = GatedProgram.of(program, find_groups(program))
    values = torch.ones(3, gated.units, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(gated.run((x,), values)[1].square().sum(), values)
    assert slope[1].abs().max() > 0
    assert slope[[0, 2]].abs().max() == 0


@pytest.mark.parametrize("criterion", ["output-shift", "fisher", "hessian-trace", "activation"])
@pytest.mark.parametrize("head", ["flattened", "image"])
def test_every_criterion_takes_every_kind_of_network(criterion: str, head: str) -> None:
    kinds = ("conv", "attention", "grouped", "gate", "layer_norm", "cat", "shuffle")
    network = Network(Design(tuple(Step(kind, 0, 1, 8) for kind in kinds), head))
    program, x = trace(network, network.example(2)), network.example(6)
    target = program(x).detach() + 0.1
    context = Context(data=Data(Arrays(x, target)), loss=F.mse_loss)
    settings = SensitivitySettings(criterion, samples=6, batch_size=3, probes=8, min_probes=8)  # type: ignore[arg-type]
    found, layout, skipped = measure(program, find_groups(program), settings, context)
    scores = layout.joined(found.scores)
    assert not skipped
    assert len(layout) > 20
    assert scores.isfinite().all()
    assert (scores > 0).float().mean() > 0.5
