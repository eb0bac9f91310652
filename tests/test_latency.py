from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fxprune.errors import InputError
from fxprune.onnx.benchmark import compare, open_session, random_inputs


def product(path: Path, size: int, dtype: int = TensorProto.FLOAT) -> Path:
    """Write a model that multiplies square matrices ``size`` times."""
    shape: list[str | int] = ["batch", size, size]
    nodes = [
        helper.make_node("MatMul", [f"v{n}" if n else "x", "x"], [f"v{n + 1}"]) for n in range(size)
    ]
    graph = helper.make_graph(
        nodes, "product",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info(f"v{size}", dtype, shape)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("threads", [1, 2])
def test_more_work_takes_longer_and_the_first_is_the_reference(
    tmp_path: Path, threads: int
) -> None:
    files = {"big": product(tmp_path / "big.onnx", 96), "small": product(tmp_path / "s.onnx", 8)}
    found = compare(files, threads=threads, seconds=0.0, minimum=9)
    assert found["big"].runs == found["small"].runs == 9
    assert found["big"].speedup == found["big"].speedup_p90 == 1.0
    assert found["small"].speedup > 1
    assert found["small"].p10_ms <= found["small"].median_ms <= found["small"].p90_ms


def test_a_processor_clock_that_stands_still_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "thread_time", lambda: 1.0)
    files = {"big": product(tmp_path / "big.onnx", 96), "small": product(tmp_path / "s.onnx", 8)}
    found = compare(files, seconds=0.0, minimum=9)
    assert found["big"].median_ms > found["small"].median_ms > 0
    assert found["small"].speedup_p10 > 1


def test_inputs_are_made_up_from_shapes_and_types(tmp_path: Path) -> None:
    for dtype, kind in ((TensorProto.FLOAT, np.float32), (TensorProto.INT32, np.int32)):
        session = open_session(product(tmp_path / "model.onnx", 4, dtype), 1)
        made = random_inputs(session, 3)
        assert made["x"].shape == (3, 4, 4)
        assert made["x"].dtype == kind
        np.testing.assert_array_equal(made["x"], random_inputs(session, 3)["x"])


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file .*none\.onnx"):
        compare({"none": tmp_path / "none.onnx"})
    whole = product(tmp_path / "whole.onnx", 4).read_bytes()
    (tmp_path / "half.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="check that it is a complete ONNX model"):
        compare({"half": tmp_path / "half.onnx"})
    assert open_session(whole, 1).get_inputs()[0].name == "x"
