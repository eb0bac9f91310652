from __future__ import annotations

import math

import pytest
import torch
from support import assert_same, trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.errors import FxpruneError, InputError
from fxprune.graph.facts import MASKS, Masks
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.training.distillation import divergence, objective, relative_distance
from fxprune.training.loop import Schedule, train


def task(count: int = 96) -> tuple[Tensor, Tensor]:
    """Points of three classes around three centres."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    return torch.eye(3, 4)[y] * 2 + torch.randn(count, 4, generator=generator) * 0.3, y


def network(**options: float) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )


def context(program: Program | None = None, labelled: bool = True) -> Context:
    x, y = task()
    samples = Arrays(x, y if labelled else None)
    return Context(Data(samples, samples), dense=program.copy() if program else None)


PLAIN = Schedule(epochs=8, lr=0.1, batch_size=16, distill=0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_learns(optimizer: str) -> None:
    x, y = task()
    program = trace(network(), x[:2])
    schedule = Schedule(8, 0.1 if optimizer == "sgd" else 0.01, optimizer, distill=0, batch_size=16)  # type: ignore[arg-type]
    history = train(program, context(), schedule)
    assert len(history) == 8
    assert history[-1].loss < 0.5 * history[0].loss
    assert float((program(x).argmax(1) == y).double().mean()) > 0.95


def test_is_the_same_for_the_same_seed_and_leaves_the_callers_generator() -> None:
    states = []
    for draws in (1, 2):
        program = trace(network(), task()[0][:2])
        torch.manual_seed(draws)
        before = torch.get_rng_state()
        train(program, context(), PLAIN)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(program.graph_module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_ends_in_evaluation_mode_even_after_an_error() -> None:
    x, _ = task()
    program = trace(network(), x[:2])
    with pytest.raises(FxpruneError, match="training diverged: the mean loss of epoch 1"):
        train(program, context(), Schedule(1, 1e30, distill=0, clip=0, warmup=0, batch_size=8))
    assert [n.args[5] for n in program.graph.nodes if "batch_norm" in n.name] == [False]


def test_masked_weights_stay_zero() -> None:
    x, _ = task()
    program = trace(network(), x[:2])
    keep = torch.rand(16, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    program.put(MASKS, Masks({"0.weight": keep}, "random"))
    with torch.no_grad():
        program.tensor("0.weight").mul_(keep)
    before = program.tensor("0.weight").detach().clone()
    train(program, context(), PLAIN)
    after = program.tensor("0.weight").detach()
    assert torch.equal(after == 0, ~keep)
    assert not torch.equal(before, after)


def test_the_first_step_is_the_textbook_one() -> None:
    x, y = task(32)
    model = nn.Linear(4, 3)
    program = trace(model, x[:2])
    samples = Arrays(x, y)
    schedule = Schedule(1, 0.1, batch_size=32, distill=0, warmup=0, clip=0, weight_decay=0.01)
    train(program, Context(Data(samples, samples)), schedule)
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            assert p.grad is not None
            decay = 0.01 if p.dim() > 1 else 0.0
            # Nesterov's first step is (1 + momentum) times the gradient.
            expected = p - 0.1 * 1.9 * (p.grad + decay * p)
            assert_same(program.tensor(name), expected)


def test_the_rate_rises_and_decays() -> None:
    rates: list[float] = []
    program = trace(network(), task()[0][:2])
    history = train(
        program, context(), Schedule(5, 0.1, batch_size=96, distill=0, warmup=0.4),
        on_epoch=lambda epoch: rates.append(epoch),
    )  # fmt: skip
    assert rates == [0, 1, 2, 3, 4]
    expected = [0.1 / 3, 0.2 / 3, *(0.05 * (1 + math.cos(math.pi * s / 3)) for s in range(3))]
    assert [epoch.lr for epoch in history] == pytest.approx(expected)


def test_without_labels_the_dense_model_teaches() -> None:
    x, _ = task()
    dense = trace(network(), x[:2])
    train(dense, context(), PLAIN)
    torch.manual_seed(5)
    student = trace(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)), x[:2])
    train(student, context(dense, labelled=False), Schedule(8, 0.1, batch_size=16))
    with torch.no_grad():
        assert float((student(x).argmax(1) == dense(x).argmax(1)).double().mean()) > 0.95


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": Data(Arrays(task()[0]))}, "there is no training data"),
        ({"distill": 0.5}, "distillation needs the dense model"),
        ({"frozen": True}, "no parameter requires a gradient"),
        ({"unlabelled": True}, "training without labels needs the dense model"),
    ],
)
def test_says_what_is_missing(change: dict[str, object], message: str) -> None:
    x, _ = task()
    program = trace(network().requires_grad_("frozen" not in change), x[:2])
    given = context(labelled="unlabelled" not in change)
    if "data" in change:
        given = Context(change["data"])
    distill = change.get("distill", 0.0)
    assert isinstance(distill, float)
    with pytest.raises(InputError, match=message):
        train(program, given, Schedule(1, distill=distill))


def test_divergence_is_that_of_the_softened_predictions() -> None:
    logits, wanted = torch.randn(2, 5, 3, 7, dtype=torch.float64)  # samples, classes, pixels
    p, q = (wanted / 4).softmax(1), (logits / 4).softmax(1)
    expected = 16 * (p * (p / q).log()).sum() / (5 * 7)
    # Three dimensions are tokens with the classes last.
    actual = divergence(logits.movedim(1, 2), wanted.movedim(1, 2), 4.0)
    assert_same(actual, expected)
    assert_same(divergence(logits[..., None], wanted[..., None], 4.0), expected)


def test_relative_distance_is_the_mean_over_outputs() -> None:
    a, b = torch.randn(4, 3), torch.randn(2)
    outputs = {"a": 1.1 * a, "b": (0.8 * b, torch.tensor([1]))}
    wanted = {"a": a, "b": (b, torch.tensor([1]))}
    assert_same(relative_distance(outputs, wanted), torch.tensor((0.01 + 0.04) / 2))


def test_cross_entropy_takes_the_logits_and_other_losses_the_whole_output() -> None:
    x, y = task(8)
    outputs = {"hidden": torch.randn(8, 2), "logits": x[:, :3]}
    of_logits = objective(Context(), 0, 1)(outputs, (), y)
    assert_same(of_logits, F.cross_entropy(x[:, :3], y))
    custom = Context(loss=lambda given, target: given["hidden"].square().mean())
    assert_same(objective(custom, 0, 1)(outputs, (), y), outputs["hidden"].square().mean())


def test_cross_entropy_of_tokens_has_the_classes_last() -> None:
    logits, y = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    expected = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    assert_same(objective(Context(), 0, 1)(logits, (), y), expected)
