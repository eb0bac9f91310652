"""Work-arounds that other packages need before they import."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable

import torch
from torch import Tensor


def enable_torchvision() -> None:
    """Make ``import torchvision`` (and ``timm``) work on a CPU build of torch.

    The extension in torchvision's standard wheel needs CUDA libraries. Without them it does not
    load, and torchvision then fails to register shapes for an operator that does not exist:
    ``operator torchvision::nms does not exist``. This function declares the operators before the
    import, and gives ``nms`` a CPU kernel. It does nothing if torchvision imports normally, is not
    installed, or fails for another reason. Call it before the first import of either package.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _forget("torchvision")
        library = _declare()
        torchvision = importlib.import_module("torchvision")
        # A library's registrations vanish with it; torchvision keeps them alive.
        torchvision.__dict__["_declared_by_fxprune"] = library


def _forget(package: str) -> None:
    """Drop the half-imported modules of a package."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def _declare() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    schemas: dict[str, Callable[..., Tensor] | None] = {
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor": suppress_overlaps,
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor": None,
    }
    for schema, kernel in schemas.items():
        name = library.define(schema)
        if kernel is not None:
            library.impl(name.rpartition("::")[2], kernel, "CPU")
    return library


def suppress_overlaps(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices of the boxes that non-maximum suppression keeps, best first.

    Args:
        boxes: (n, 4), each as ``x1, y1, x2, y2``.
        scores: (n,).
        iou_threshold: a box is dropped if its overlap with a better kept box exceeds this.

    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    overlaps = common / (area[:, None] + area[None, :] - common) > iou_threshold
    keep = torch.ones(len(boxes), dtype=torch.bool)
    for position in range(len(boxes)):  # greedy by definition: each choice depends on the last
        if keep[position]:
            keep[position + 1 :] &= ~overlaps[position, position + 1 :]
    return order[keep]
