from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from fxprune.graph.custom_ops import fake_quantize
from fxprune.quantization.observers import (
    Method,
    Observer,
    activation_scale,
    divergence,
    weight_scale,
)


def watched(*batches: Tensor) -> Observer:
    observer = Observer()
    for batch in batches:
        observer.extremes(batch)
    for batch in batches:
        observer.add_to_histogram(batch)
    return observer


def gaussian(seed: int = 0, count: int = 20000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def rounding_error(x: Tensor, low: float, high: float) -> float:
    scale, zero = activation_scale(low, high, (0, 255))
    rounded = fake_quantize(x, torch.tensor(scale), torch.tensor(zero), 0, 255, -1)
    return float((rounded - x).square().mean())


def test_extremes_are_of_all_batches_and_averages_of_each() -> None:
    observer = watched(torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]))
    assert observer.span("minmax", 256) == (-3, 2)
    assert observer.span("moving-average", 256) == pytest.approx((-1.2, 1.9))


def test_a_percentile_leaves_outliers_out() -> None:
    x = torch.cat([gaussian(count=200000), torch.tensor([1000.0])])
    low, high = watched(x[:100000], x[100000:]).span("percentile", 256)
    assert -6 < low < -3
    assert 0 < high < 10


def test_least_squares_is_near_the_best_of_all_ranges() -> None:
    x = gaussian().pow(3).relu()
    low, high = watched(x).span("mse", 16)
    scale = torch.tensor(high / 15)

    def error(step: Tensor) -> float:
        codes = torch.clamp(torch.round(x / step), 0, 15)
        return float((codes * step - x).square().mean())

    best = min(error(top / 15) for top in torch.linspace(0.5, float(x.max()), 400))
    assert low == 0
    assert error(scale) <= 1.05 * best


def test_pixels_are_not_left_half_way_between_codes() -> None:
    pixels = torch.arange(256) / 127.5 - 1
    whole = rounding_error(pixels, -1.0, 1.0)
    assert whole == pytest.approx(0.25 * (2 / 255) ** 2, rel=0.02)
    assert rounding_error(pixels, *watched(pixels).span("mse", 256)) < 0.35 * whole
    assert rounding_error(pixels, *watched(pixels).span("histogram", 256)) < 1.05 * whole


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_keeps_rounding_small(method: str) -> None:
    x = gaussian()
    span = watched(x[:7000], x[7000:]).span(method, 256)  # type: ignore[arg-type]
    assert rounding_error(x, *span) < 5e-4


def test_divergence_is_zero_where_every_bin_has_its_code() -> None:
    counts = torch.rand(64, dtype=torch.float64)
    centres = torch.arange(64).double()
    ends = torch.tensor([0.0]).double(), torch.tensor([63.0]).double()
    assert divergence(counts, centres, *ends, 64).item() == pytest.approx(0, abs=1e-12)
    assert divergence(counts, centres, *ends, 8).item() > 0.01


def test_a_constant_or_unseen_value_has_a_range() -> None:
    assert watched(torch.full((3,), 2.0)).span("mse", 256) == (2, 2)
    assert activation_scale(2.0, 2.0, (0, 255))[1] == 0
    assert watched(torch.zeros(5)).span("histogram", 256) == (0, 0)


@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.2), (0.0, 6.0), (-4.0, -1.0), (0.5, 3.0)])
def test_zero_has_a_code(low: float, high: float) -> None:
    scale, zero = activation_scale(low, high, (0, 255))
    assert 0 <= zero <= 255
    top = scale * (255 - zero)
    assert top <= max(high, 0) + scale / 2
    if low >= 0:
        assert zero == 0
        assert torch.tensor(255.0) * torch.tensor(scale) <= torch.tensor(high)


def test_weights_scale_by_their_largest_or_by_least_squares() -> None:
    weight = gaussian(count=4 * 200).view(4, 200)
    weight[3] = 0
    plain = weight_scale(weight, 7, 0)
    assert torch.equal(plain[:3], (weight.abs().amax(1) / 7)[:3])
    assert plain[3] == 1
    searched = weight_scale(weight, 7, 0, search=True)

    def error(scale: Tensor) -> Tensor:
        codes = torch.clamp(torch.round(weight / scale[:, None]), -7, 7)
        return (codes * scale[:, None] - weight).square().sum(1)

    tried = torch.stack([error(plain * share) for share in torch.linspace(0.5, 1, 500)])
    assert bool((error(searched) <= 1.05 * tried.amin(0)).all())
