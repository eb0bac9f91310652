from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from fxprune.models.compat import enable_torchvision, suppress_overlaps


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(float(width), 0.0) * max(float(height), 0.0)
    areas = [float((box[2] - box[0]) * (box[3] - box[1])) for box in (first, second)]
    return common / (sum(areas) - common)


def greedy(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    """The definition, box by box."""
    kept: list[int] = []
    for index in sorted(range(len(boxes)), key=lambda i: -float(scores[i])):
        if all(overlap(boxes[index], boxes[other]) <= threshold for other in kept):
            kept.append(index)
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_suppression_equals_its_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(30, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([corners, corners + 0.1 + torch.rand(30, 2, generator=generator)], dim=1)
    scores = torch.rand(30, generator=generator)
    assert suppress_overlaps(boxes, scores, 0.3).tolist() == greedy(boxes, scores, 0.3)


def test_suppression_of_nothing_is_nothing() -> None:
    assert suppress_overlaps(torch.empty(0, 4), torch.empty(0), 0.5).tolist() == []


def test_torchvision_and_timm_import_afterwards_and_twice_is_once() -> None:
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    script = """
from fxprune.models.compat import enable_torchvision
enable_torchvision()
enable_torchvision()
import torch, torchvision, timm
torchvision.models.mobilenet_v2()
assert torch.ops.torchvision.nms(torch.tensor([[0., 0, 1, 1]]), torch.ones(1), 0.5).tolist() == [0]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)


def test_nothing_happens_where_torchvision_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    enable_torchvision()
    assert "torchvision" not in sys.modules
