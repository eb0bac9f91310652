from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from support import trace
from torch import nn

from fxprune.graph.program import Program
from fxprune.models.compat import enable_torchvision
from fxprune.structure.groups import find_groups

enable_torchvision()
models = pytest.importorskip("torchvision.models")


def vit() -> nn.Module:
    return models.VisionTransformer(  # type: ignore[no-any-return]
        image_size=16, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64,
        num_classes=10,
    )  # fmt: skip


def swin() -> nn.Module:
    return models.SwinTransformer(  # type: ignore[no-any-return]
        patch_size=[4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4],
        num_classes=10,
    )  # fmt: skip


def densenet() -> nn.Module:
    return models.DenseNet(  # type: ignore[no-any-return]
        growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=10
    )


PLACE = re.compile(r', "[^"]*", line \d+')  # in a source file
# Wiring as in the published models; transformers and DenseNet with fewer and smaller blocks.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: models.resnet18(), 32),
    "mobilenet_v2": (lambda: models.mobilenet_v2(), 32),
    "shufflenet_v2": (lambda: models.shufflenet_v2_x0_5(), 64),
    "densenet": (densenet, 32),
    "swin": (swin, 64),
    "vit": (vit, 16),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_of_published_networks(name: str, golden: Callable[[str, str], None]) -> None:
    build, side = NETWORKS[name]
    golden(f"groups_{name}", groups_text(trace(build(), torch.zeros(2, 3, side, side))))


def groups_text(program: Program) -> str:
    """Write every group: units, name, what freezes or mixes it, and its slots."""
    lines = []
    for group in find_groups(program):
        reason = PLACE.sub("", group.frozen_because or "")
        notes = [f"frozen: {reason}"] * bool(reason)
        notes += [f"mixed by {', '.join(group.mixed_by)}"] * bool(group.mixed_by)
        lines.append("; ".join([f"{len(group.units)} {group.name}", *notes]))
        for slot in group.slots:
            times = group.multiplicity(slot)
            lines.append(f"    {slot}" + f" x{times}" * (times > 1))
    return "\n".join(lines)
