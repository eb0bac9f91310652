"""The models of the coverage table: named suites, and how to build each model and its inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxprune.models.compat import enable_torchvision
from tools import coverage_huggingface, coverage_layers

LIST = Path(__file__).with_name("coverage_timm.txt")
Case = tuple[nn.Module, tuple[Any, ...]]

TORCHVISION = (
    "alexnet", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2",
    "densenet121", "googlenet", "inception_v3", "squeezenet1_0", "mobilenet_v2",
    "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "efficientnet_b0",
    "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny", "swin_t",
    "swin_v2_t", "maxvit_t", "vit_b_32",
)  # fmt: skip
SEGMENTATION = (
    "fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)  # fmt: skip
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v1_b", "swin3d_t")
DETECTION = (
    "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn",
    "retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large",
)  # fmt: skip


def suites() -> dict[str, Callable[[], list[str]]]:
    """Return, by suite, what lists its models."""
    return {
        "layers": lambda: list(coverage_layers.MODELS),
        "huggingface": lambda: list(coverage_huggingface.MODELS),
        "torchvision": lambda: list(TORCHVISION),
        "segmentation": lambda: list(SEGMENTATION),
        "video": lambda: list(VIDEO),
        "detection": lambda: list(DETECTION),
        "timm": listed,
    }


def load_zoo(suite: str) -> None:
    """Import what a suite's models come from."""
    enable_torchvision()
    if suite != "layers":
        importlib.import_module(
            {"timm": "timm", "huggingface": "transformers"}.get(suite, "torchvision")
        )


def build(suite: str, name: str) -> Case:
    """Make a model with random weights, and inputs that run it."""
    enable_torchvision()
    if suite in ("layers", "huggingface"):
        made = coverage_layers.MODELS if suite == "layers" else coverage_huggingface.MODELS
        return made[name]()
    if suite == "timm":
        model = importlib.import_module("timm").create_model(name)
        return model, (torch.randn(1, *model.pretrained_cfg["input_size"]),)
    models = importlib.import_module("torchvision.models")
    if suite == "detection":
        vars(importlib.import_module("torchvision.extension"))["_has_ops"] = lambda: True
        model = models.get_model(name, weights=None, weights_backbone=None)
        return model.backbone, (torch.randn(1, 3, 320, 320),)
    options = {} if suite in ("torchvision", "video") else {"weights_backbone": None}
    model = models.get_model(name, weights=None, **options)
    if suite == "video":
        frames = 16 if name.startswith(("mvit", "s3d")) else 8
        size = 224 if name.startswith(("mvit", "s3d", "swin")) else 112
        return model, (torch.randn(1, 3, frames, size, size),)
    size = 299 if name == "inception_v3" else 224
    return model, (torch.randn(1, 3, size, size),)


def listed() -> list[str]:
    """Name the models of ``coverage_timm.txt``."""
    lines = [line.partition("#")[0].strip() for line in LIST.read_text().splitlines()]
    return [line for line in lines if line]


def write_list() -> None:
    """Look for timm's smallest model of every architecture module; that takes minutes."""
    enable_torchvision()
    timm = importlib.import_module("timm")
    module_of = importlib.import_module("timm.models._registry")._model_to_module
    best: dict[str, tuple[float, str]] = {}
    for name in timm.list_models(exclude_filters="test_*"):
        found = _millions(timm, name), name
        best[module_of[name]] = min(best.get(module_of[name], found), found)
    lines = [
        f"# The smallest model of each of timm {timm.__version__}'s architecture modules, its own "
        "test models aside,\n# by size. Written by: python -m tools.coverage_models\n"
    ]
    for module, (size, name) in sorted(best.items(), key=lambda item: item[1]):
        lines.append(f"{name}  # {module}, {size:.1f} M\n")
    LIST.write_text("".join(lines))


def _millions(timm: Any, name: str) -> float:
    """Count parameters without allocating them."""
    with FakeTensorMode():
        model = timm.create_model(name)
    return float(sum(parameter.numel() for parameter in model.parameters()) / 1e6)


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make random weights matter: untrained norms, scales and biases are constants.

    With batch norms that are the identity and layer scales near zero, removing units hardly
    changes anything and a check of it would prove nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.is_floating_point() and tensor.numel() > 1 and _constant(tensor):
                level = float(tensor.reshape(-1)[0])
                if abs(level) < 1e-2:
                    tensor.normal_(0, 0.1, generator=generator)
                else:
                    tensor.uniform_(0.7, 1.3, generator=generator).mul_(level)
        for module in model.modules():
            mean, variance = (getattr(module, f"running_{name}", None) for name in ("mean", "var"))
            if isinstance(mean, Tensor) and isinstance(variance, Tensor):
                mean.uniform_(-0.5, 0.5, generator=generator)
                variance.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def _constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.reshape(-1)[0]).all())


if __name__ == "__main__":
    write_list()
