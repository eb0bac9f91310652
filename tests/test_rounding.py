from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fxprune.quantization.adaptive import round_adaptively, squared_change


def problem(outputs: int, features: int, groups: int = 2) -> tuple[Tensor, Tensor]:
    """Weights in steps, and second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(groups, features, features, dtype=torch.float64, generator=generator)
    inputs = mixed @ torch.randn(groups, features, 40, dtype=torch.float64, generator=generator)
    steps = 3 * torch.randn(groups, outputs, features, dtype=torch.float64, generator=generator)
    return steps, inputs @ inputs.transpose(1, 2)


def best(steps: Tensor, gram: Tensor) -> Tensor:
    """The least that outputs can move, by trying all ways to round."""
    ups = torch.tensor(list(itertools.product((0.0, 1.0), repeat=steps.shape[2]))).double()
    changes = steps.floor().unsqueeze(2) + ups - steps.unsqueeze(2)  # groups, outputs, ways, f
    return torch.einsum("gowi,gij,gowj->gow", changes, gram, changes).amin(2)


def test_comes_near_the_best_of_all_ways_to_round() -> None:
    steps, gram = problem(16, 8)
    found = squared_change(round_adaptively(steps, gram, 127) - steps, gram)
    nearest, least = squared_change(steps.round() - steps, gram), best(steps, gram)
    assert bool((found <= nearest).all())
    assert bool((found >= least * (1 - 1e-9)).all())
    assert float(found.sum()) < 1.2 * float(least.sum()) < 0.7 * float(nearest.sum())


def test_codes_are_next_to_their_weights_and_in_range() -> None:
    steps, gram = problem(8, 24)
    codes = round_adaptively(steps, gram, 4)
    assert torch.equal(codes, codes.round())
    assert float(codes.abs().max()) <= 4
    inside = steps.abs() < 4
    assert float((codes - steps)[inside].abs().max()) < 1
    assert not round_adaptively(torch.zeros(1, 2, 24).double(), gram[:1], 4).any()


def test_uncorrelated_inputs_are_rounded_to_the_nearest() -> None:
    steps, _ = problem(8, 12)
    scales = torch.rand(2, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(round_adaptively(steps, torch.diag_embed(scales), 127), steps.round())


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    steps, gram = problem(4, 6)
    gram[:, 2], gram[:, :, 2] = 0, 0
    assert bool(round_adaptively(steps, gram, 127).isfinite().all())
    assert bool(round_adaptively(steps, torch.zeros_like(gram), 127).isfinite().all())
