from __future__ import annotations

import numpy as np
import torch
from support import assert_same, randomise_norms, trace
from torch import Tensor, nn

from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.passes.recalibrate_norms import RecalibrateNorms
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Skip

X = torch.randn(50, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def context(x: Tensor = X) -> Context:
    return Context(Data(Arrays(x)))


def test_statistics_are_those_of_all_samples() -> None:
    conv = nn.Conv2d(3, 4, 3)
    model = randomise_norms(nn.Sequential(conv, nn.BatchNorm2d(4))).double()
    program = trace(model, X[:2])
    outcome = RecalibrateNorms(batch_size=16)(program, context())
    assert (outcome.changes, outcome.details) == (1, {"samples": 50})
    everything = conv(X).detach().numpy()
    state = program.graph_module.state_dict()
    np.testing.assert_allclose(state["1.running_mean"], everything.mean((0, 2, 3)), rtol=1e-12)
    expected = everything.var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(state["1.running_var"], expected, rtol=1e-12)


def test_one_batch_gives_what_training_would() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=1.0), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=1.0),
    ).double()  # fmt: skip
    program = trace(randomise_norms(model), X[:2])
    RecalibrateNorms(batch_size=50)(program, context())
    model.train()
    model[3].eval()
    model(X)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            assert_same(program.tensor(name), tensor)


def test_a_norm_called_twice_counts_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) + self.bn(3 * x + 1)  # type: ignore[no-any-return]

    program = trace(Twice().double(), X[:2])
    assert RecalibrateNorms()(program, context()).changes == 2
    both = torch.cat([X, 3 * X + 1])
    assert_same(program.tensor("bn.running_mean"), both.mean((0, 2, 3)))
    assert_same(program.tensor("bn.running_var"), both.var((0, 2, 3)))


def test_takes_as_many_samples_as_asked_and_the_same_ones_for_a_seed() -> None:
    states = []
    for _ in range(2):
        program = trace(nn.Sequential(nn.BatchNorm2d(3)).double(), X[:2])
        outcome = RecalibrateNorms(samples=20, batch_size=8)(program, context())
        assert outcome.details == {"samples": 20}
        states.append(program.tensor("0.running_mean").clone())
    assert torch.equal(*states)


def test_leaves_out_a_last_batch_of_one() -> None:
    program = trace(nn.BatchNorm1d(3).double(), X[:2, :, 0, 0])
    outcome = RecalibrateNorms(samples=7, batch_size=3)(program, context(X[:, :, 0, 0]))
    assert outcome.details == {"samples": 6}


def test_runs_where_the_batch_is_fixed() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x).view(4, 108)  # type: ignore[no-any-return]

    program = trace(Fixed().double(), X[:4])
    assert not program.dynamic
    RecalibrateNorms()(program, context())
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:48]
    assert_same(program.tensor("bn.running_mean"), X[order].mean((0, 2, 3)))


def test_does_nothing_without_norms_and_asks_for_no_data() -> None:
    program = trace(nn.Conv2d(3, 4, 3).double(), X[:2])
    assert RecalibrateNorms()(program, Context()).changes == 0


def test_leaves_instance_norms() -> None:
    model = nn.InstanceNorm2d(3, track_running_stats=True).double()
    outcome = RecalibrateNorms()(trace(model, X[:2]), Context())
    reason = "an instance norm computes its statistics from each sample"
    assert outcome.skips == (Skip("instance_norm", reason),)


def test_the_program_stays_in_evaluation_mode_and_needs_no_gradient() -> None:
    program = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double(), X[:2])
    RecalibrateNorms()(program, context())
    assert torch.equal(program(X[:1]), program(X[:3])[:1]) or torch.allclose(
        program(X[:1]), program(X[:3])[:1], rtol=1e-12
    )
    assert not program.tensor("1.running_mean").requires_grad
