from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from quantized_nets import calibrated
from support import trace
from torch import nn
from torch.nn import functional as F

from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.graph.custom_ops import fake_quantize
from fxprune.passes import InsertObservers, TrainQuantized
from fxprune.pipeline.context import Context
from fxprune.quantization.fake_quantizers import fake_quantizer_sites
from fxprune.quantization.layer_costs import rounding_costs


def test_a_linear_model_costs_what_its_gauss_newton_matrix_says() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 6)
    model = nn.Linear(6, 3)
    program = trace(model, x[:2])
    context = Context(Data(Arrays(x, torch.zeros(4000).long())), dense=program.copy())
    InsertObservers(reduce_range=True, measure=False)(program, context)
    TrainQuantized(bias_correction=False)(program, context)
    found = rounding_costs(program, context, 4000, 500)
    site = {site.symmetric: site for site in fake_quantizer_sites(program)}

    def rounded(symmetric: bool, value: torch.Tensor) -> torch.Tensor:
        this = site[symmetric]
        scale = program.tensor(this.key)
        zero = program.tensor(this.key.replace("scale", "zero_point"))
        found: torch.Tensor = fake_quantize(value, scale, zero, this.low, this.high, this.axis)
        return found

    with torch.no_grad():
        logits = model(x).double()
        moved = F.linear(rounded(False, x), rounded(True, model.weight), model.bias).double()
        shift, p = moved - logits, logits.softmax(1)
        # d' (diag p - p p') d / 2, averaged over samples.
        exact = ((p * shift.square()).sum(1) - (p * shift).sum(1).square()).mean() / 2
    assert list(found) == ["weight"]
    np.testing.assert_allclose(found["weight"], float(exact), rtol=0.15)


def test_the_report_ranks_all_layers() -> None:
    program, context = calibrated()
    costs = rounding_costs(program, context, 96, 32)
    assert set(costs) == {
        f"{n}.weight" for n in ("stem", "down", "left", "right", "hidden", "head")
    }
    values = list(costs.values())
    assert values == sorted(values, reverse=True)
    assert values[-1] > 0
    coarse = program.copy()
    scale = coarse.tensor("right.weight_scale")
    with torch.no_grad():
        scale.mul_(30)
    assert next(iter(rounding_costs(coarse, context, 96, 32))) == "right.weight"


def test_costs_of_fewer_samples_than_a_batch_are_their_mean() -> None:
    program, context = calibrated()
    images = torch.stack([context.samples.calibration[number][0] for number in range(16)])
    small = replace(context, data=Data(Arrays(images)))
    whole, larger = (rounding_costs(program, small, 64, size) for size in (16, 64))
    assert whole == larger
