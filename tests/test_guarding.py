from __future__ import annotations

import pytest
import torch
from support import trace
from test_training import PLAIN, context, network, task

from fxprune.pipeline.context import Context
from fxprune.training.guarding import SHARES, guarded
from fxprune.training.loop import Epoch, train


def test_harm_is_undone() -> None:
    before = trace(network(), task()[0][:2]).graph_module.state_dict()
    program = trace(network(), task()[0][:2])

    def spoil(_: Context) -> tuple[Epoch, ...]:
        with torch.no_grad():
            program.tensor("4.bias").copy_(torch.tensor([-900.0, 300, 300]))
            program.tensor("1.running_mean").add_(50)
        return ()

    found = guarded(program, context(), PLAIN, 0.4, spoil)
    assert found.kept == 0
    assert found.losses is not None
    assert list(found.losses) == list(SHARES)
    after = program.graph_module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    (note,) = found.notes
    assert note.startswith("fine-tuning: kept the weights 0% of the way")


def test_what_is_kept_has_the_loss_that_is_told() -> None:
    program = trace(network(), task()[0][:2])
    seen: list[int] = []

    def learn(part: Context) -> tuple[Epoch, ...]:
        assert part.samples.train is not None
        seen.append(len(part.samples.train))
        return train(program, part, PLAIN)

    found = guarded(program, context(), PLAIN, 0.4, learn)
    assert (seen, found.held_out) == ([58], 38)
    assert found.losses is not None
    assert found.losses[found.kept] == min(found.losses.values()) < 0.5 * found.losses[0.0]


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_few_samples_judge_nothing(share: float) -> None:
    program = trace(network(), task()[0][:2])
    found = guarded(program, context(), PLAIN, share, lambda part: train(program, part, PLAIN))
    assert set(found.to_details()) == {"epochs"}
    assert found.notes == ()
