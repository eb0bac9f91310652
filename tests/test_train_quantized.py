from __future__ import annotations

from typing import cast, get_args

import pytest
import torch
from quantized_nets import calibrated, observed
from support import relative_error
from torch import Tensor, nn

import fxprune.quantization.bias
from fxprune.data.batches import batches
from fxprune.errors import InputError
from fxprune.graph.custom_ops import along
from fxprune.graph.facts import CALIBRATED, MASKS, OBSERVED, Masks
from fxprune.graph.program import Program
from fxprune.passes import TrainQuantized
from fxprune.pipeline.context import Context
from fxprune.quantization import recovery as quantization_recovery
from fxprune.quantization.fake_quantizers import fake_quantizer_sites, observer_sites
from fxprune.quantization.observers import Method


def states(program: Program) -> dict[str, Tensor]:
    return program.graph_module.state_dict()


def images(context: Context) -> Tensor:
    (batch,) = batches(context.samples.calibration, 96)
    return cast(Tensor, batch.inputs[0])


def error(program: Program, context: Context) -> float:
    x = images(context)
    assert context.dense is not None
    with torch.no_grad():
        return relative_error(program(x), context.dense(x))


@pytest.mark.parametrize("method", get_args(Method))
def test_calibration_comes_near_the_dense_program(method: str) -> None:
    program, context = calibrated(observer=method)
    assert observer_sites(program) == ()
    assert error(program, context) < 0.15
    for site in fake_quantizer_sites(program):
        assert bool((program.tensor(site.key) > 0).all())


def test_relu_has_its_zero_at_the_lowest_code_and_a_clamp_its_ceiling() -> None:
    program, _ = calibrated(observer="minmax")
    state = states(program)
    assert state["quantizers.relu6.zero_point"] == 0
    assert 255 * state["quantizers.relu6.scale"] <= 6
    assert state["quantizers.conv2d_1.zero_point"] > 0


@pytest.mark.parametrize("memory", [2**28, 2**16])  # in one batch, and in several
@pytest.mark.parametrize("rounding", ["nearest", "adaptive"])
def test_correcting_biases_leaves_the_means_of_the_dense_program(
    rounding: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fxprune.quantization.bias, "MAX_VALUE_BYTES", memory)
    plain, context = calibrated(bias_correction=False)
    corrected, _ = calibrated(samples=96, rounding=rounding)
    x, dense = images(context), context.dense
    assert dense is not None
    with torch.no_grad():
        wanted = dense(x).mean(0)
        before, after = (program(x).mean(0) - wanted for program in (plain, corrected))
    assert after.abs().max() < (0.05 if memory > 2**20 else 0.25) * before.abs().max() + 1e-5


@pytest.mark.parametrize("learn", [False, True])
def test_training_lowers_the_loss_and_leaves_buffers(learn: bool) -> None:
    program, context = observed(reduce_range=True)
    step = TrainQuantized(epochs=4, lr=0.01, learn_scales=learn, batch_size=16, temperature=1.0)
    outcome = step(program, context)
    losses = [epoch["loss"] for epoch in outcome.details["epochs"]]
    assert losses[-1] < losses[0]
    names = {name for name, _ in program.graph_module.named_parameters()}
    assert not any("scale" in name for name in names)
    again, _ = observed(reduce_range=True)
    step(again, context)
    for name, tensor in states(program).items():
        assert torch.equal(tensor, states(again)[name]), name


def test_scales_are_learned_and_move() -> None:
    fixed, _ = calibrated(epochs=2, freeze=0.0)
    learned, _ = calibrated(epochs=2, learn_scales=True)
    measured, _ = calibrated(epochs=2, freeze=1.0)
    key = "quantizers.relu.scale"
    assert states(fixed)[key] != states(learned)[key]
    assert states(fixed)[key] != states(measured)[key]
    assert 255 * states(learned)["quantizers.relu6.scale"] <= 6


def test_masked_weights_stay_zero() -> None:
    program, context = observed()
    keep = torch.ones(16, 8, 3, 3, dtype=torch.bool)
    keep[:, ::2] = False
    with torch.no_grad():
        program.tensor("down.weight").mul_(keep)
    program.put(MASKS, Masks({"down.weight": keep}, "half"))
    TrainQuantized(epochs=1)(program, context)
    weight = program.tensor("down.weight")
    assert isinstance(weight, nn.Parameter)
    assert not weight[~keep].any()
    assert weight[keep].any()


def test_training_needs_training_data() -> None:
    program, context = observed()
    data = {"calibration": context.samples.calibration, "train": None, "eval": None}
    with pytest.raises(InputError, match="no training data"):
        TrainQuantized(epochs=1)(program, type(context)(data, dense=context.dense))


def test_layers_are_left_in_floating_point_until_predictions_are_won_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gaps = iter([10.0, 6.0, 1.0])
    monkeypatch.setattr(quantization_recovery, "disagreement", lambda *_: next(gaps))
    program, context = observed(reduce_range=True)
    before = set(program.get(OBSERVED).layers.values())
    outcome = TrainQuantized(recover=8.0)(program, context)
    assert outcome.details["disagreement"] == [10.0, 6.0, 1.0]
    left = outcome.details["fp32"]
    assert left
    assert set(program.get(CALIBRATED).layers.values()) == before - set(left)
    rounded = {site.value.target for site in fake_quantizer_sites(program) if site.symmetric}
    assert rounded == before - set(left)
    assert f"1.00 % with these layers in FP32: {', '.join(left)}" in str(outcome.notes)
    (table,) = outcome.tables
    assert {row[0] for row in table.rows if row[-1] == "FP32"} <= set(left)
    assert error(program, context) < 0.15


def test_nothing_is_left_where_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization_recovery, "disagreement", lambda *_: 0.0)
    program, context = observed(reduce_range=True)
    outcome = TrainQuantized(recover=1.0)(program, context)
    assert outcome.details["fp32"] == []
    assert outcome.notes == ("rounding changes 0.00 % of predictions",)


def test_adaptive_rounding_keeps_to_the_range() -> None:
    adaptive, context = calibrated(rounding="adaptive")
    assert error(adaptive, context) < 0.15
    for site in fake_quantizer_sites(adaptive):
        if site.symmetric:
            weight = adaptive.tensor(str(site.value.target)).detach()
            scale = adaptive.tensor(site.key)
            codes = (weight / along(scale, weight, site.axis)).flatten(1)
            assert float((codes - codes.round()).abs().max()) < 1e-3
            sums = codes[:, 1:] + codes[:, :-1]  # of neighbours: two products fit 16 bits
            assert float(sums.abs().max()) < 128.5


def test_adaptive_rounding_tells_what_it_won() -> None:
    program, context = observed(reduce_range=True)
    keep = torch.zeros(16, 8, 3, 3, dtype=torch.bool)
    with torch.no_grad():
        program.tensor("down.weight").mul_(keep)
    outcome = TrainQuantized(rounding="adaptive")(program, context)
    shares = outcome.details["error_of_nearest"]
    assert shares["down.weight"] == 1
    assert all(share <= 1 for share in shares.values())
    assert min(shares.values()) < 0.9
    assert outcome.details["turned"] > 0
    assert not program.tensor("down.weight").any()


def test_training_keeps_the_point_of_least_held_out_loss() -> None:
    program, context = observed(reduce_range=True)
    outcome = TrainQuantized(epochs=1, lr=5.0, held_out=0.4, batch_size=16)(program, context)
    assert outcome.details["kept"] < 1
    assert "validation loss" in outcome.notes[0]
