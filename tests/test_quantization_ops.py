from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from fxprune.graph.custom_ops import along, dequantize, fake_quantize, observe, quantize


def runtime_codes(x: Tensor, scale: Tensor, zero: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """What ONNX Runtime's QuantizeLinear gives, and DequantizeLinear of that."""
    kind = TensorProto.UINT8 if zero.dtype == torch.uint8 else TensorProto.INT8
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=axis),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=axis),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, scale.shape),
            helper.make_tensor_value_info("z", kind, zero.shape),
        ],
        [
            helper.make_tensor_value_info("q", kind, x.shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape),
        ],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    codes, numbers = session.run(None, {"x": x.numpy(), "s": scale.numpy(), "z": zero.numpy()})
    return torch.from_numpy(codes), torch.from_numpy(numbers)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), signed=st.booleans(), channels=st.booleans())
def test_codes_are_those_of_onnx_runtime(seed: int, signed: bool, channels: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    dtype = torch.int8 if signed else torch.uint8
    shape = (3,) if channels else ()
    scale = torch.rand(shape, generator=random) * 0.1 + 0.01
    low = -20 if signed else 0
    zero = torch.randint(low, 20, shape, generator=random).to(dtype)
    # Halves of a step are where rounding could differ.
    steps = torch.randint(-400, 400, (4, 3, 5), generator=random) / 2
    axis = 1 if channels else -1
    x = steps * along(scale, steps, axis)
    codes, numbers = runtime_codes(x, scale, zero, axis)
    assert torch.equal(quantize(x, scale, zero, axis), codes)
    assert torch.equal(dequantize(codes, scale, zero, axis), numbers)
    limits = torch.iinfo(dtype)
    assert torch.equal(fake_quantize(x, scale, zero, limits.min, limits.max, axis), numbers)


def test_the_gradient_passes_straight_through_what_is_in_range() -> None:
    x = torch.tensor([-1.0, 0.3, 2.0, 9.0], requires_grad=True)
    y = fake_quantize(x, torch.tensor(0.1), torch.tensor(0, dtype=torch.uint8), 0, 50, -1)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]
    z = torch.ones(2, requires_grad=True)
    observe(z, "z", 0, 255, False, -1).sum().backward()
    assert z.grad is not None
    assert z.grad.tolist() == [1, 1]


@pytest.mark.parametrize("axis", [-1, 0])
def test_the_gradient_of_a_scale_is_that_of_learned_step_sizes(axis: int) -> None:
    x = torch.tensor([[0.26, -0.5, 7.0], [0.11, 0.0, -9.0]], dtype=torch.float64)
    shape = (2,) if axis == 0 else ()
    scale = torch.full(shape, 0.1, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(shape, dtype=torch.int8)
    fake_quantize(x, scale, zero, -20, 30, axis).sum().backward()
    # Inside: the code less the exact number of steps; outside: the outermost code.
    each = np.array([[3 - 2.6, 0.0, 30.0], [1 - 1.1, 0.0, -20.0]])
    expected = each.sum(1) if axis == 0 else each.sum()
    assert scale.grad is not None
    np.testing.assert_allclose(scale.grad.numpy(), expected, atol=1e-12)


def test_an_operator_runs_on_fake_tensors() -> None:
    arguments = (torch.randn(2, 3), torch.rand(3), torch.zeros(3, dtype=torch.int8))
    torch.library.opcheck(fake_quantize, (*arguments, -127, 127, 1), test_utils="test_faketensor")
    torch.library.opcheck(quantize, (*arguments, 1), test_utils="test_faketensor")
