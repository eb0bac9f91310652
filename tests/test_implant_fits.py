from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import assert_same, relative_error, trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.calibration.layer_matrix import drawn_features
from fxprune.calibration.moments import Moments
from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.errors import InputError
from fxprune.graph.program import Program
from fxprune.implants.fits import fit
from fxprune.implants.implant_types import Implant, Kind, Site, site_of
from fxprune.implants.moments import Sampling, measure
from fxprune.pipeline.context import Context

GENERATOR = torch.Generator().manual_seed(0)
# Neighbours and channels are correlated, as those of images are.
X = F.avg_pool2d(torch.randn(40, 4, 12, 12, generator=GENERATOR, dtype=torch.float64), 3, 1)
X = torch.cat([X, 0.5 * X[:, :2] + 0.1 * torch.randn(X[:, :2].shape, generator=GENERATOR)], 1)
ALL = Sampling(40, 16, 10**9)


def measured(layer: nn.Module, x: Tensor = X) -> tuple[Program, Site, Moments]:
    program = trace(nn.Sequential(layer).double(), x[:2])
    (node,) = (node for node in program.graph.nodes if node.op == "call_function")
    site = site_of(program, node)
    assert isinstance(site, Site)
    return program, site, measure(program, [site], Context(Data(Arrays(x))), ALL)[node.name]


def fitted(layer: Any, kind: str, x: Tensor = X, **options: Any) -> tuple[Site, Moments, Implant]:
    _, site, moments = measured(layer, x)
    return site, moments, fit(site, layer.weight, layer.bias, moments, Kind.parse(kind), **options)


def run(site: Site, implant: Implant, x: Tensor) -> Tensor:
    """Apply the stages one by one."""
    for number, stage in enumerate(implant.stages):
        bias = implant.bias if number + 1 == len(implant.stages) else None
        if not site.kernel:
            x = F.linear(x, stage.weight, bias)
            continue
        pads = [amount for amount in reversed(stage.padding) for _ in range(2)]
        slides = (stage.stride, 0, stage.dilation, stage.groups)
        call = F.conv1d if len(site.kernel) == 1 else F.conv2d
        x = call(F.pad(x, pads), stage.weight, bias, *slides)
    return x


LAYERS = {
    "plain": nn.Conv2d(6, 8, 3, padding=1),
    "strided": nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
    "dilated": nn.Conv2d(6, 8, 3, padding=2, dilation=2),
    "cropping": nn.Conv2d(6, 8, 3),
    "oblong": nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 2)),
    "same": nn.Conv2d(6, 8, 3, padding="same"),
}


@pytest.mark.parametrize("kind", ["pointwise", "depthwise", "pair:3", "low-rank:3"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_stages_amount_to_the_rows_and_the_error_is_as_told(layer: str, kind: str) -> None:
    convolution = LAYERS[layer].double()
    site, _, implant = fitted(convolution, kind)
    with torch.no_grad():
        expected = convolution(X)
        actual = run(site, implant, X)
    weight = implant.rows.view_as(convolution.weight)
    replaced = copy.deepcopy(convolution)
    with torch.no_grad():
        replaced.weight.copy_(weight)
        replaced.bias = nn.Parameter(implant.bias)
        assert_same(actual, replaced(X))
    error = (actual - expected).transpose(0, 1).flatten(1)
    assert float(error.mean(1).abs().max()) < 1e-8
    told = error.var(1, correction=0) / expected.transpose(0, 1).flatten(1).var(1, correction=0)
    assert_same(implant.unexplained, told)


@pytest.mark.parametrize("layer", ["plain", "strided", "cropping"])
def test_full_rank_reproduces_the_layer(layer: str) -> None:
    convolution = LAYERS[layer].double()
    for kind in ("low-rank:8", "pair:24"):
        site, _, implant = fitted(convolution, kind)
        with torch.no_grad():
            assert_same(run(site, implant, X), convolution(X))
        assert float(implant.unexplained.max()) < 1e-12


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_error_of_a_rank_is_what_is_left_of_the_whitened_spectrum(rank: int) -> None:
    scale = torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    convolution = LAYERS["plain"].double()
    site, moments, implant = fitted(convolution, f"low-rank:{rank}", scale=scale)
    # Outputs times a square root of the covariance, by another way than the fit's.
    spectrum, vectors = torch.linalg.eigh(moments.covariance[0])
    root = vectors * spectrum.clamp_min(0).sqrt()
    rows = convolution.weight.detach().flatten(1) * scale.view(-1, 1)
    values = torch.linalg.svdvals(rows @ root)
    with torch.no_grad():
        error = (run(site, implant, X) - convolution(X)) * scale.view(1, -1, 1, 1)
    measured_error = error.square().sum() / (error.numel() / 8)
    assert_same(measured_error, values[rank:].square().sum())


def test_a_centre_kernel_becomes_a_1x1_exactly() -> None:
    convolution = nn.Conv2d(6, 8, 3, stride=2, padding=1).double()
    with torch.no_grad():
        centre = convolution.weight[:, :, 1:2, 1:2].clone()
        convolution.weight.zero_()[:, :, 1:2, 1:2] = centre
    _, _, implant = fitted(convolution, "pointwise")
    assert_same(implant.stages[0].weight, centre)
    assert_same(implant.bias, convolution.bias)


def test_separable_kernels_are_exact() -> None:
    column, line = torch.randn(2, 6, 3, 1).double(), torch.randn(8, 2, 1, 3).double()
    kernels, mixing = torch.randn(1, 6, 3, 3).double(), torch.randn(8, 6, 1, 1).double()
    pair, depthwise = (nn.Conv2d(6, 8, 3, padding=1).double() for _ in range(2))
    with torch.no_grad():
        pair.weight.copy_(torch.einsum("rchx,nryw->nchw", column, line))
        depthwise.weight.copy_(kernels * mixing)
    for layer, kind in ((pair, "pair:2"), (depthwise, "depthwise")):
        site, _, implant = fitted(layer, kind)
        with torch.no_grad():
            assert relative_error(run(site, implant, X), layer(X)) < 1e-7  # both are damped


def test_a_1x1_is_the_least_squares_solution() -> None:
    convolution = LAYERS["cropping"].double()
    _, _, implant = fitted(convolution, "pointwise")
    reads = X[:, :, 1:-1, 1:-1].movedim(1, -1).flatten(0, -2)
    reads = torch.cat([reads, torch.ones(len(reads), 1, dtype=reads.dtype)], 1)
    with torch.no_grad():
        wanted = convolution(X).movedim(1, -1).flatten(0, -2)
    solution = torch.linalg.lstsq(reads, wanted).solution.T
    assert_same(implant.stages[0].weight.flatten(1), solution[:, :-1])
    assert_same(implant.bias, solution[:, -1])


def test_more_ridge_means_smaller_weights() -> None:
    sizes = [
        float(fitted(LAYERS["plain"].double(), "pointwise", ridge=ridge)[2].rows.norm())
        for ridge in (0.0, 0.1, 10.0)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("shape", [(30, 7), (30, 4, 7)])
def test_linear_layers_and_1d_convolutions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    linear = nn.Linear(7, 5).double()
    site, _, implant = fitted(linear, "low-rank:5", x)
    with torch.no_grad():
        assert_same(run(site, implant, x), linear(x))
    if len(shape) == 3:
        convolution = nn.Conv1d(4, 5, 3, padding=1, stride=2).double()
        site, _, implant = fitted(convolution, "low-rank:5", x)
        with torch.no_grad():
            assert_same(run(site, implant, x), convolution(x))


def test_an_even_kernel_has_no_centre() -> None:
    with pytest.raises(InputError, match="no centre"):
        fitted(nn.Conv2d(6, 8, 2).double(), "pointwise")


def test_moments_are_those_of_all_positions() -> None:
    _, site, moments = measured(LAYERS["oblong"].double())
    spread = drawn_features(site.node, X, None, None)
    with torch.no_grad():
        product = spread @ LAYERS["oblong"].weight.flatten(1).T + LAYERS["oblong"].get_parameter(
            "bias"
        )
        expected = LAYERS["oblong"](X).movedim(1, -1).flatten(0, -2)
    assert_same(product, expected)
    assert moments.count == len(spread)
    assert_same(moments.mean[0], spread.mean(0))
    assert_same(moments.covariance[0], spread.T.cov(correction=0))
