from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from fxprune.errors import InputError
from fxprune.latency.cache import Host
from fxprune.onnx.benchmark import (
    compare,
    fallback_note,
    open_session,
    parse_shapes,
    random_inputs,
)


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


def test_latency_is_measured_at_the_shapes_that_are_named(tmp_path: Path) -> None:
    path = product(tmp_path / "model.onnx", 4)
    session = open_session(path, 1)
    made = random_inputs(session, 1, parse_shapes(["x=5x4x4"]))
    assert made["x"].shape == (5, 4, 4)
    big = product(tmp_path / "big.onnx", 48)
    one = compare({"big": big}, seconds=0.0, minimum=9, shapes={"x": (1, 48, 48)})["big"]
    many = compare({"big": big}, seconds=0.0, minimum=9, shapes={"x": (16, 48, 48)})["big"]
    assert many.median_ms > 2 * one.median_ms


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x=1x5x4", "where only names are free"),
        ("x=4x4", "where only names are free"),
        ("y=1x4x4", "the model does not have"),
        ("x", "write name=SIZExSIZE"),
        ("x=0x4x4", "write name=SIZExSIZE"),
    ],
)
def test_a_shape_that_does_not_suit_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    session = open_session(product(tmp_path / "model.onnx", 4), 1)
    with pytest.raises(InputError, match=reason):
        random_inputs(session, 1, parse_shapes([text]))


def test_an_unknown_provider_is_refused_and_a_fallback_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = product(tmp_path / "model.onnx", 4)
    with pytest.raises(InputError, match=r"it has .*CPUExecutionProvider"):
        compare({"a": path}, provider="NoSuchExecutionProvider")
    here = onnxruntime.get_available_providers()
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: [*here, "CUDAExecutionProvider"]
    )
    real = onnxruntime.InferenceSession

    def falling_back(model: Any, options: Any, providers: Any) -> Any:
        return real(model, options, providers=providers[1:])

    monkeypatch.setattr(onnxruntime, "InferenceSession", falling_back)
    found = compare({"a": path}, seconds=0.0, minimum=3, provider="CUDAExecutionProvider")
    assert found["a"].provider == "CPUExecutionProvider"
    note = fallback_note(found, "CUDAExecutionProvider")
    assert note is not None
    assert "fell back from CUDAExecutionProvider to CPUExecutionProvider" in note
    assert fallback_note(found, "CPUExecutionProvider") is None


def test_the_cache_has_a_file_for_each_provider() -> None:
    assert Host.here(1).path != Host.here(1, "OtherExecutionProvider").path
