from __future__ import annotations

from pathlib import Path

import onnx
import torch
from support import trace
from torch import nn

from fxprune.onnx.export import export_onnx


def test_only_what_is_not_implied_is_written(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, 2, 1, groups=2), nn.Flatten(), nn.Linear(54, 3)
    )
    path = tmp_path / "a.onnx"
    assert export_onnx(trace(model, torch.randn(2, 4, 7, 7)), path).parity <= 1e-5  # type: ignore[operator]
    written = onnx.load(str(path))
    onnx.checker.check_model(written)
    graph = written.graph
    assert not graph.value_info
    assert not graph.metadata_props
    assert not any(item.metadata_props for item in (*graph.node, *graph.initializer))
    plain, strided = (node for node in graph.node if node.op_type == "Conv")
    assert {item.name for item in strided.attribute} >= {"group", "strides", "pads"}
    assert not {item.name for item in plain.attribute} & {"group", "strides", "dilations"}
    inferred = onnx.shape_inference.infer_shapes(written, strict_mode=True, data_prop=True)
    assert len(inferred.graph.value_info) >= len(graph.node) - 1
