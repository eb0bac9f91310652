from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import assert_same, randomise_norms, trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.reconstruction.incremental_run import IncrementalRun, Store


class Skip(nn.Module):
    """A shortcut, and a batch size that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Linear(48, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x + self.norm(self.one(x)))
        return self.two(x.view(x.shape[0], -1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("limit", [0, 500, 2**30])
def test_stops_anywhere_at_the_cost_of_one_run(limit: int) -> None:
    program = trace(randomise_norms(Skip()).eval(), torch.randn(2, 3, 4, 4))
    batches = [torch.randn(n, 3, 4, 4) for n in (4, 4, 3)]
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    relu = next(node for node in nodes if "relu" in node.name)
    (last,) = (node for node in nodes if "linear" in node.name)
    with torch.no_grad(), Store(limit) as store:
        walk = IncrementalRun(program, store, "walk")
        for batch in batches:
            walk.enter((batch,))
        for node in nodes:  # every stop there is
            walk.advance(node, [last])
        walk.advance(None, [last, relu])
        for number, batch in enumerate(batches):
            assert_same(walk.value(last, number), program(batch))
        assert store.peak <= limit
        assert (store.spilled > 0) == (limit < 2**30)


def test_a_store_leaves_nothing_behind() -> None:
    with Store(0) as store:
        store.put(("a", "b", 0), torch.arange(6.0).view(2, 3).T)
        store.put(("a", "c", 0), 3)
        store.put(("a", "d", 0), torch.empty(0, 3))
        assert store._folder is not None
        folder = Path(store._folder.name)
        assert len(list(folder.iterdir())) == 1
        assert torch.equal(store.get(("a", "b", 0)), torch.arange(6.0).view(2, 3).T)
        assert store.get(("a", "c", 0)) == 3
        assert store.get(("a", "d", 0)).shape == (0, 3)
        store.drop(("a", "b", 0))
        assert not list(folder.iterdir())
    assert not folder.exists()
