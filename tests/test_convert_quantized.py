from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from quantized_nets import Shortcuts, attention, calibrated, converted, shortcuts
from support import relative_error, trace
from torch import nn

import fxprune
import fxprune.run.quantized_checks
from fxprune.data.batches import batches
from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.graph.cost import cost
from fxprune.graph.text import graph_text
from fxprune.onnx.export import export_onnx
from fxprune.onnx.quantized_nodes import inspect_fusion
from fxprune.passes import ConvertQuantized, InsertObservers, TrainQuantized
from fxprune.pipeline.context import Context
from fxprune.pipeline.driver import Pipeline
from fxprune.run.quantized_checks import check_agreement, check_fusion
from fxprune.training.evaluate import run_onnx, run_program

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_the_converted_program_computes_what_the_rounded_one_did() -> None:
    program, context = calibrated()
    before = program.copy()
    assert ConvertQuantized()(program, context).changes > 0
    with torch.no_grad():
        assert relative_error(program(X), before(X)) < 0.02
        same = program(X).argmax(1) == before(X).argmax(1)
    assert same.double().mean() >= 31 / 32
    assert cost(program).params == cost(before).params
    assert cost(program).macs == cost(before).macs


def test_weights_and_biases_are_stored_as_codes() -> None:
    program, _ = converted()
    for name in ("stem", "down", "left", "right", "hidden", "head"):
        weight, bias = program.tensor(f"{name}.weight"), program.tensor(f"{name}.bias")
        assert (weight.dtype, bias.dtype) == (torch.int8, torch.int32)
        assert isinstance(weight, nn.Parameter)
        # Two products of neighbours fit 16 bits, whatever the activations.
        rows = weight.movedim(1, -1).flatten(1).double()
        for side in (rows.clamp_min(0), (-rows).clamp_min(0)):
            assert 255 * (side[:, :-1] + side[:, 1:]).max() < 2**15


@pytest.mark.parametrize("outputs", [6, 12])
def test_depthwise_layers_have_the_full_range(outputs: int, tmp_path: Path) -> None:
    layer = nn.Conv2d(6, outputs, 3, padding=1, groups=6)
    nn.init.uniform_(layer.weight, 0.98, 1.0)
    x = 1 - 0.05 * X.abs().repeat(1, 2, 1, 1).clamp(0, 1)  # sums as large as they can be
    program = trace(nn.Sequential(layer, nn.ReLU()), x[:2])
    context = Context(Data(Arrays(x)), dense=program.copy())
    steps = InsertObservers(reduce_range=True, measure=False), TrainQuantized(observer="minmax")
    Pipeline((*steps, ConvertQuantized())).run(program, context)
    alone = outputs == 6  # kernels for these have long sums
    codes = program.tensor("0.weight").flatten(1).int()
    assert bool((codes[:, 1:] + codes[:, :-1] > 128).any()) == alone
    export_onnx(program, tmp_path / "depthwise.onnx")
    with torch.no_grad():
        assert relative_error(run_onnx(tmp_path / "depthwise.onnx")((x,)), program(x)) < 1.1 / 255


def test_a_bias_that_dwarfs_its_weights_is_kept() -> None:
    program, context = calibrated()
    with torch.no_grad():
        program.tensor("head.weight")[1] *= 1e-9
        program.tensor("head.weight_scale")[1] *= 1e-9
        program.tensor("head.bias")[1] = 5.0
    ConvertQuantized()(program, context)
    with torch.no_grad():
        torch.testing.assert_close(program(X)[:, 1], torch.full((32,), 5.0), rtol=1e-6, atol=0)


def test_a_pruned_and_quantised_model_in_one_call(tmp_path: Path) -> None:
    _, context = calibrated()
    torch.manual_seed(0)
    result = fxprune.compile(
        Shortcuts(), (X[:1],), data=context.samples, target="params=70%", int8=True, out=tmp_path,
        latency_seconds=0.1,
    )  # fmt: skip
    checks = result.report.checks
    assert checks["int8_fused"].passed
    assert checks["int8_agreement"].passed
    assert result.report.ok
    assert result.report.after.onnx_bytes is not None
    weights = result.program.graph_module.state_dict()
    assert any(t.dtype == torch.int8 for name, t in weights.items() if name.endswith(".weight"))
    assert "convert-quantized" in (tmp_path / "recipe.toml").read_text()


def test_moves_work_on_codes() -> None:
    program, _ = converted()
    kinds = {
        node.name: node.meta["val"].dtype
        for node in program.graph.nodes
        if any(word in node.name for word in ("slice", "pad", "cat", "max_pool", "flatten"))
    }
    assert set(kinds.values()) == {torch.uint8}
    assert len(kinds) >= 5


@pytest.mark.parametrize("inside", [True, False], ids=["in the model", "from the data"])
def test_pools_between_codes_take_channels_last_values(inside: bool, tmp_path: Path) -> None:
    """PyTorch pools 8-bit integers of that memory format only where maps are tiny."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.contiguous(memory_format=torch.channels_last) if inside else x
            return self.last(nn.functional.max_pool2d(self.first(x).relu(), 3, 2, 1)).mean((2, 3))  # type: ignore[no-any-return]

    x = torch.randn(24, 3, 24, 24).contiguous(memory_format=torch.channels_last)
    program = trace(Pooled(), x[:2])
    context = Context(Data(Arrays(x)), dense=program.copy())
    for step in (InsertObservers(measure=False), TrainQuantized(samples=24), ConvertQuantized()):
        step(program, context)
    pool = next(node for node in program.graph.nodes if "max_pool2d" in str(node.target))
    assert pool.meta["val"].dtype == torch.uint8
    with torch.no_grad():
        assert torch.equal(program(x), program(x.contiguous()))
    assert export_onnx(program, tmp_path / "m.onnx").parity == pytest.approx(0, abs=0.1)


def test_a_converted_program_survives_saving(tmp_path: Path) -> None:
    program, _ = converted()
    fxprune.save(program, tmp_path / "model.pt2")
    loaded = fxprune.load(tmp_path / "model.pt2")
    assert graph_text(loaded) == graph_text(program)
    assert loaded.facts == program.facts
    with torch.no_grad():
        assert torch.equal(loaded(X), program(X))


def test_onnx_runtime_fuses_everything_and_agrees(tmp_path: Path) -> None:
    program, context = converted()
    path = tmp_path / "model.onnx"
    export_onnx(program, path)
    initialisers = {item.name: item for item in onnx.load(str(path)).graph.initializer}
    assert initialisers["down.weight"].data_type == TensorProto.INT8
    assert initialisers["down.bias"].data_type == TensorProto.INT32
    fusion = inspect_fusion(path)
    assert fusion.unfused == ()
    assert fusion.fused["QLinearConv"] == 4
    assert fusion.fused["QGemm"] == 2
    assert fusion.fused["QLinearAdd"] == 1
    assert check_fusion(path).passed
    check = check_agreement(program, path, context.samples)
    assert check.passed
    assert check.note == "of 96 predictions in both runtimes"
    session = onnxruntime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    with torch.no_grad():
        assert relative_error(torch.from_numpy(found), program(X)) < 0.05


def test_predictions_may_differ_as_much_as_they_do_in_one_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, context = converted()
    path = tmp_path / "model.onnx"
    export_onnx(program, path)
    other = program.copy()
    with torch.no_grad():
        other.tensor("head.bias")[1] += 2**20
    check = check_agreement(other, path, context.samples)
    assert not check.passed
    assert check.value is not None
    spread = (check.value * (1 - check.value) / 96) ** 0.5
    assert check.limit == pytest.approx(max(1.5 / 96, 2 * spread))
    assert check.note is not None
    assert check.note.endswith("; 0.0% differ in ONNX Runtime with and without fused operators")

    def run(path: Path, *, fused: bool = True) -> Any:
        return run_onnx(path) if fused else run_program(other)

    monkeypatch.setattr(fxprune.run.quantized_checks, "run_onnx", run)
    assert check_agreement(other, path, context.samples).passed


def test_onnx_runtime_does_not_round_what_stays_in_floating_point(tmp_path: Path) -> None:
    program, context = shortcuts()
    with torch.no_grad():
        program.tensor("down.weight")[0] *= 300  # one scale in all would ruin the other channels
    Pipeline(
        [InsertObservers(fp32=("down",), measure=False), TrainQuantized(), ConvertQuantized()]
    ).run(program, context)
    export_onnx(program, tmp_path / "model.onnx")
    fusion = inspect_fusion(tmp_path / "model.onnx")
    assert fusion.fused["QLinearConv"] == 3
    assert fusion.unfused == ()


def test_a_node_that_does_not_fuse_is_named(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(torch.ones(4, 3, 3, 3, dtype=torch.int8).numpy(), "w.weight")
    scale = numpy_helper.from_array(torch.tensor(0.1).numpy(), "s")
    zeros = [numpy_helper.from_array(torch.zeros((), dtype=t).numpy(), n)
             for n, t in (("zu", torch.uint8), ("zi", torch.int8))]  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "zu"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "zu"], ["dx"]),
        helper.make_node("DequantizeLinear", ["w.weight", "s", "zi"], ["dw"]),
        helper.make_node("Conv", ["dx", "dw"], ["y"], name="conv"),  # its output is no code
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])],
        [weight, scale, *zeros],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, str(tmp_path / "model.onnx"))
    assert inspect_fusion(tmp_path / "model.onnx").unfused == ("w.weight",)
    check = check_fusion(tmp_path / "model.onnx")
    assert (check.passed, check.value) == (False, 1)
    assert check.note is not None
    assert "w.weight" in check.note


@pytest.mark.parametrize("products", [False, True])
def test_products_of_activations_run_on_codes_where_asked_for(
    tmp_path: Path, products: bool
) -> None:
    program, context = attention(attention=products)
    (batch,) = batches(context.samples.calibration, 64)
    assert context.dense is not None
    with torch.no_grad():
        assert relative_error(program(*batch.inputs), context.dense(*batch.inputs)) < 0.1
    export_onnx(program, tmp_path / "a.onnx")
    fusion = inspect_fusion(tmp_path / "a.onnx")
    assert fusion.unfused == ()
    assert sum(fusion.fused.values()) == (4 if products else 2)


def test_a_product_of_activations_that_did_not_fuse_is_named(tmp_path: Path) -> None:
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
    zero = numpy_helper.from_array(np.array(0, np.uint16), "zero")  # 16 bits fuse nowhere
    nodes = [
        helper.make_node(operator, [name + before, "scale", "zero"], [name + after])
        for name in "xy"
        for operator, before, after in (
            ("QuantizeLinear", "", "_codes"),
            ("DequantizeLinear", "_codes", "_again"),
        )
    ]
    nodes.append(helper.make_node("MatMul", ["x_again", "y_again"], ["z"], "product"))
    slots = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in "xyz"]
    graph = helper.make_graph(nodes, "g", slots[:2], slots[2:], [scale, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(tmp_path / "a.onnx"))
    assert inspect_fusion(tmp_path / "a.onnx").unfused == ("product",)
