from __future__ import annotations

import pytest
import torch
from quantized_nets import observed, shortcuts
from support import check, trace
from torch import Tensor, nn

from fxprune.context import Context
from fxprune.facts import OBSERVED
from fxprune.passes import InsertObservers
from fxprune.pipeline import Skip
from fxprune.quantization import sites

IMAGE = torch.randn(2, 3, 8, 8)


def test_a_convolution_and_its_relu_have_codes_before_and_after() -> None:
    outcome = check(
        InsertObservers(reduce_range=True), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), IMAGE,
        before="""
        input_1: 2x3x8x8 = input
        conv2d: 2x4x6x6 = conv2d(input_1, <0.weight 4x3x3x3>, <0.bias 4>)
        relu: 2x4x6x6 = relu(conv2d)
        return relu
        """,
        after="""
        input_1: 2x3x8x8 = input
        observe_default: 2x3x8x8 = fxprune.observe(input_1, input_1, 0, 255, False, -1)
        observe_default_2: 4x3x3x3 = fxprune.observe(<0.weight 4x3x3x3>, 0.weight, -127, 127, True, 0)
        conv2d: 2x4x6x6 = conv2d(observe_default, observe_default_2, <0.bias 4>)
        relu: 2x4x6x6 = relu(conv2d)
        observe_default_1: 2x4x6x6 = fxprune.observe(relu, relu, 0, 255, False, -1)
        return observe_default_1
        """,  # noqa: E501
    )  # fmt: skip
    assert (outcome.changes, outcome.skips) == (3, ())
    assert outcome.details is not None
    assert (outcome.details["layers"], outcome.details["others"]) == (1, 0)


def test_values_that_meet_in_a_concatenation_share_a_scale() -> None:
    program, _ = observed()
    keys = [site.key for site in sites(program) if not site.symmetric]
    stem, down, added, left, right = "relu6", "conv2d_1", "relu", "relu_1", "relu_2"
    assert keys.count(left) == 2
    assert right not in keys
    assert {stem, down, added} <= set(keys)
    assert program.get(OBSERVED).layers["conv2d"] == "stem.weight"
    # The pad, the slices and the maximum have no observer of their own.
    assert not any(word in key for key in keys for word in ("pad", "slice", "max_pool"))


def test_layers_named_by_a_pattern_stay_in_floating_point() -> None:
    program, context = shortcuts()
    outcome = InsertObservers(fp32=("hidden*", "conv2d_3"))(program, context)
    assert {skip.node for skip in outcome.skips} == {"linear", "conv2d_3"}
    weights = {site.key for site in sites(program) if site.symmetric}
    assert weights == {"stem.weight", "down.weight", "left.weight", "head.weight"}


class Shares(nn.Module):
    """An embedding whose weight is the head's, and a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.linear(self.table(x), torch.diag(self.scale))
        return torch.nn.functional.linear(x, self.table.weight)


def declined(model: nn.Module, x: Tensor) -> dict[str, str]:
    program = trace(model, x)
    outcome = InsertObservers()(program, Context())
    return {skip.node: skip.reason for skip in outcome.skips}


def test_declines_weights_that_others_read_or_that_are_computed() -> None:
    assert declined(Shares(), torch.tensor([[1, 2], [3, 4]])) == {
        "linear": "its weight is computed, not stored",
        "linear_1": "its weight has other readers than layers",
    }


def test_declines_a_convolution_with_a_norm_behind_it() -> None:
    found = declined(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), IMAGE)
    assert found == {"conv2d": "a batch norm follows it; run fold-batchnorm first"}


@pytest.mark.parametrize("depthwise", [False, True])
def test_depthwise_convolutions_are_left_if_asked_for(depthwise: bool) -> None:
    program = trace(nn.Conv2d(3, 6, 3, groups=3), IMAGE)
    outcome = InsertObservers(depthwise=depthwise)(program, Context())
    reason = "depthwise convolutions are to stay in floating point"
    assert outcome.skips == (() if depthwise else (Skip("conv2d", reason),))
    assert outcome.changes == (3 if depthwise else 0)


@pytest.mark.parametrize("reduced", [False, True])
def test_the_range_of_weights_is_reduced_where_that_is_needed(reduced: bool) -> None:
    program, _ = observed(reduce_range=reduced)
    assert program.get(OBSERVED).paired == reduced
