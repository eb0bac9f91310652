from __future__ import annotations

import torch
from support import trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.calibration.layer_matrix import layers
from fxprune.graph.program import Program
from fxprune.reconstruction.driver import Reconstruction
from fxprune.reconstruction.incremental_run import Store
from fxprune.reconstruction.layer_solvers import SolverSettings

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Chain(nn.Module):
    """Three layers, of which the last reads the first as well."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        return self.three(x + F.relu(self.two(x)))  # type: ignore[no-any-return]


def torn() -> tuple[Program, Program]:
    """A program whose first layer has lost weights, and the dense one."""
    dense = trace(Chain().double(), X[:2])
    program = dense.copy()
    with torch.no_grad():
        program.tensor("one.weight")[:, :2] = 0
    return program, dense


def mend(
    program: Program,
    dense: Program,
    settings: SolverSettings,
    lookahead: int = 0,
    limit: int = 2**20,
) -> list[str]:
    with torch.no_grad(), Store(limit) as store:
        task = Reconstruction(program, dense, settings, store, "cpu", lookahead=lookahead)
        for batch in X.split(20):
            task.enter((batch,))
        assert len(task) == 3
        return [layer.layer for layer in task.run() if layer is not None]


def test_layers_are_solved_for_on_what_those_before_them_make() -> None:
    program, dense = torn()
    assert mend(program, dense, SolverSettings(ridge=0.0, held_out=0.0))[0] == "one.weight"
    with torch.no_grad():  # nothing is removed, so the first layer finds its old weights again
        torch.testing.assert_close(program(X), dense(X))


def test_regions_are_compared_layer_by_layer_in_graph_order() -> None:
    program, dense = torn()
    with torch.no_grad():
        for name in ("two.weight", "three.weight"):
            program.tensor(name)[0] += 0.5
        before = float((program(X) - dense(X)).square().mean())
    names = [layer.weight for layer in layers(program)]
    assert mend(program, dense, SolverSettings(), 2, limit=0) == names
    with torch.no_grad():
        assert float((program(X) - dense(X)).square().mean()) < before / 2


def test_memory_limits_the_batch() -> None:
    program, dense = torn()
    with Store(0) as store:
        tasks = [
            Reconstruction(program, dense, SolverSettings(), store, "cpu", lookahead=ahead)
            for ahead in (0, 1, 4)
        ]
        most = [task.max_batch(2**20) for task in tasks]
        assert most[0] > most[1] > most[2] > 1
        assert tasks[2].max_batch(0) == 1
        assert tasks[2].max_batch(2**21) >= 2 * most[2]


def test_weights_may_be_chosen() -> None:
    program, dense = torn()
    with Store(0) as store:
        task = Reconstruction(
            program, dense, SolverSettings(), store, "cpu", lambda name: name.startswith("t")
        )
        assert len(task) == 2
