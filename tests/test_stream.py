from __future__ import annotations

import pytest
import torch
from support import trace
from torch import nn
from torch.nn import functional as F

from fxprune.calibration.layer_matrix import drawn_features
from fxprune.calibration.stream import Remainder, calibration_stream
from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.errors import InputError
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context

X = torch.randn(22, 3, 9, 8, generator=torch.Generator().manual_seed(0))
CONV = nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1))


def fixed(size: int) -> Program:
    program = trace(CONV, X[:size])
    program.dynamic = ()
    return program


@pytest.mark.parametrize(
    ("remainder", "samples", "batch_size", "sizes"),
    [
        ("keep", 22, 10, [10, 10, 2]),
        ("drop", 22, 10, [10, 10]),
        ("spread", 22, 10, [8, 8, 6]),
        ("keep", 16, 64, [16]),
        ("drop", 16, 64, [16]),
        ("spread", 100, 64, [22]),
    ],
)
def test_samples_that_do_not_fill_a_batch(
    remainder: Remainder, samples: int, batch_size: int, sizes: list[int]
) -> None:
    program, context = trace(CONV, X[:2]), Context(Data(Arrays(X)))
    stream = calibration_stream(program, context, samples, batch_size, remainder=remainder)
    assert [len(batch) for batch in stream] == sizes
    assert (len(stream), stream.total) == (len(sizes), sum(sizes))


def test_a_program_of_fixed_batch_gets_whole_batches_of_its_size() -> None:
    stream = calibration_stream(fixed(5), Context(Data(Arrays(X))), 18, 64)
    assert [len(batch) for batch in stream] == [5, 5, 5]
    with pytest.raises(InputError, match="at least 5 samples and has 4"):
        calibration_stream(fixed(5), Context(Data(Arrays(X[:4]))), 18, 64)


def test_drawn_features_are_columns_of_the_whole_matrix() -> None:
    (call,) = (n for n in trace(CONV, X).graph.nodes if n.target is torch.ops.aten.conv2d.default)
    settings = {name: getattr(CONV, name) for name in ("stride", "padding", "dilation")}
    columns = F.unfold(X, CONV.kernel_size, **settings).transpose(1, 2).flatten(0, 1)
    assert torch.equal(drawn_features(call, X, None, None), columns)
    order = torch.randperm(len(columns), generator=torch.Generator().manual_seed(1))
    drawn = drawn_features(call, X, 50, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, columns[order[:50]])
