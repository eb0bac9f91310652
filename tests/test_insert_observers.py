from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_nets import observed, shortcuts
from support import check, trace
from torch import Tensor, nn

from fxprune.graph.facts import OBSERVED
from fxprune.latency import table as latency_table
from fxprune.latency.layer_config import LayerConfig
from fxprune.latency.table import ANCHOR_ENTRIES, Table, key_of
from fxprune.latency.timed_model import Entry
from fxprune.passes import InsertObservers
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Skip
from fxprune.pipeline.progress import Tracker
from fxprune.quantization.fake_quantizers import observer_sites
from fxprune.quantization.patterns import has_weight, pattern_of, weight_name
from fxprune.quantization.timing import divide

IMAGE = torch.randn(2, 3, 8, 8)


def test_a_convolution_and_its_relu_have_codes_before_and_after() -> None:
    outcome = check(
        InsertObservers(reduce_range=True, measure=False),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), IMAGE,
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
    assert (outcome.details["layers"], outcome.details["others"]) == (1, 0)


def test_values_that_meet_in_a_concatenation_share_a_scale() -> None:
    program, _ = observed()
    keys = [site.key for site in observer_sites(program) if not site.symmetric]
    stem, down, added, left, right = "relu6", "conv2d_1", "relu", "relu_1", "relu_2"
    assert keys.count(left) == 2
    assert right not in keys
    assert {stem, down, added} <= set(keys)
    assert program.get(OBSERVED).layers["conv2d"] == "stem.weight"
    # The pad, the slices and the maximum have no observer of their own.
    assert not any(word in key for key in keys for word in ("pad", "slice", "max_pool"))


def test_layers_named_by_a_pattern_stay_in_floating_point() -> None:
    program, context = shortcuts()
    outcome = InsertObservers(fp32=("hidden*", "conv2d_3"), measure=False)(program, context)
    assert {skip.node for skip in outcome.skips} == {"linear", "conv2d_3"}
    weights = {site.key for site in observer_sites(program) if site.symmetric}
    assert weights == {"stem.weight", "down.weight", "left.weight", "head.weight"}


class Shares(nn.Module):
    """An embedding whose weight is the head's, and a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        x = torch.nn.functional.linear(x, torch.diag(self.scale) * x.mean())
        return torch.nn.functional.linear(x, self.table.weight)


def declined(model: nn.Module, x: Tensor) -> dict[str, str]:
    program = trace(model, x)
    outcome = InsertObservers(measure=False)(program, Context())
    return {skip.node: skip.reason for skip in outcome.skips}


def test_declines_weights_that_others_read_or_that_are_computed() -> None:
    assert declined(Shares(), torch.tensor([[1, 2], [3, 4]])) == {
        "linear": "its weight is computed, not stored",
        "linear_1": "operators other than layers read its weight",
    }


def test_declines_a_convolution_with_a_norm_behind_it() -> None:
    found = declined(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), IMAGE)
    assert found == {"conv2d": "a batch norm follows it; run fold-batchnorm first"}


@pytest.mark.parametrize("depthwise", [False, True])
def test_depthwise_convolutions_are_left_if_asked_for(depthwise: bool) -> None:
    program = trace(nn.Conv2d(3, 6, 3, groups=3), IMAGE)
    outcome = InsertObservers(depthwise=depthwise, measure=False)(program, Context())
    reason = "the option depthwise=false keeps it in FP32"
    assert outcome.skips == (() if depthwise else (Skip("conv2d", reason),))
    assert outcome.changes == (3 if depthwise else 0)


@pytest.mark.parametrize("reduced", [False, True])
def test_the_range_of_weights_is_reduced_where_that_is_needed(reduced: bool) -> None:
    program, _ = observed(reduce_range=reduced)
    assert program.get(OBSERVED).paired == reduced


Times = Callable[[LayerConfig], tuple[float, float]]


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Times, float], None]:
    """Let operators take the times in INT8 and in FP32 that a function says; conversions others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def use(times: Times, conversion: float) -> None:
        def measured(entries: Sequence[Entry], threads: int) -> dict[str, float]:
            found = {}
            for entry in entries:
                one, form = entry
                timed = times(one)[form == "fp32"]
                found[key_of(entry)] = conversion if "quantize" in one.kind else timed
            return found | {key_of(anchor): 50.0 for anchor in ANCHOR_ENTRIES}

        monkeypatch.setattr(latency_table, "measure", measured)

    return use


def test_layers_that_lose_by_int8_are_left_and_named(
    pretend: Callable[[Times, float], None],
) -> None:
    pretend(lambda one: (30.0, 10.0) if one.kind == "linear" else (10.0, 30.0), 1.0)
    program, context = shortcuts()
    outcome = InsertObservers()(program, context)
    assert {skip.node for skip in outcome.skips} == {"linear", "linear_1"}
    assert "30 us against 10 us in FP32 (0.33x)" in outcome.skips[0].reason
    assert set(program.get(OBSERVED).layers.values()) == {
        "stem.weight", "down.weight", "left.weight", "right.weight",
    }  # fmt: skip
    (table,) = outcome.tables
    int8 = set(program.get(OBSERVED).layers.values())
    assert {row[0] for row in table.rows if row[3] == "INT8"} >= int8
    assert table.rows[0][0].endswith(".weight")
    assert table.rows[0][1:] == ("30.0", "10.0", "FP32")


def test_a_slower_layer_stays_in_int8_where_conversions_cost_more(
    pretend: Callable[[Times, float], None],
) -> None:
    pretend(lambda one: (14.0, 10.0) if one.dims[2:] == (1,) else (10.0, 30.0), 3.0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    program = trace(model, IMAGE)
    assert InsertObservers()(program, Context()).skips == ()
    end = trace(
        nn.Sequential(model[2], model[3], nn.Flatten(), nn.Linear(128, 4)), torch.randn(2, 8, 6, 6)
    )
    (skip,) = InsertObservers()(end, Context()).skips
    assert skip.node == "conv2d"


def test_where_no_layer_gains_all_are_converted_and_a_note_says_so(
    pretend: Callable[[Times, float], None],
) -> None:
    pretend(lambda _: (30.0, 10.0), 1.0)
    program, context = shortcuts()
    outcome = InsertObservers(reduce_range=False)(program, context)
    assert outcome.skips == ()
    assert len(program.get(OBSERVED).layers) == 6
    (note,) = outcome.notes
    assert "no layer was faster in INT8" in note


def test_layers_and_conversions_are_timed(tmp_path: Path) -> None:
    program = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4)), IMAGE)
    layers = [node for node in program.graph.nodes if pattern_of(node) is not None]
    table = Table.open(1, tmp_path / "table.json")
    found = divide(program, layers, table, Tracker(False)).layers
    assert list(found) == layers
    assert all(timing.int8 > 0 and timing.fp32 > 0 for timing in found.values())
    again = divide(program, layers, Table.open(1, table.path), Tracker(False)).layers
    assert again == found


class Stream(nn.Module):
    """A stem, and two residual blocks on what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.one(x))
        return torch.relu(x + self.two(x))


def test_sums_stay_in_int8_behind_a_stem_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """One conversion of the stem's values pays for all sums of the stream."""

    def times(program: Any, layers: Any, *_: object) -> dict[Any, tuple[float, float]]:
        return {
            node: (1000.0, 1.0) if "stem" in weight_name(node) else (1.0, 1000.0)
            for node in layers
            if has_weight(node)
        }

    monkeypatch.setattr("fxprune.quantization.timing._times", times)
    program = trace(Stream().eval(), torch.randn(2, 3, 8, 8))
    outcome = InsertObservers()(program, Context())
    assert [skip.node for skip in outcome.skips] == ["conv2d"]
    assert outcome.details == {"layers": 2, "others": 2}
