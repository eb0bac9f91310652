"""What ONNX and ONNX Runtime cannot do: it is said in the first seconds, in plain words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import ExportError, InputError, PostconditionError
from fxprune.onnx.export import export_onnx
from fxprune.pipeline.progress import Tracker
from fxprune.run import candidates

QUICK: dict[str, Any] = {"latency_seconds": 0.02, "progress": Tracker(False), "int8": False}


def image_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    ).to(dtype).eval()  # fmt: skip


def images(dtype: torch.dtype = torch.float32, count: int = 40) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 8, 8, dtype=dtype), torch.arange(count) % 5


class Stream(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.mean.mul_(0.9).add_(y.mean(0), alpha=0.1)
        result: Tensor = self.out(y - self.mean)
        return result


class BatchGroups(nn.Module):
    """A convolution with as many groups as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.out = nn.Linear(3, 4 * 3 * 9), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(x.mean((2, 3))).view(-1, 3, 3, 3)
        y = F.conv2d(x.flatten(0, 1)[None], weights, padding=1, groups=x.shape[0])
        result: Tensor = self.out(y.view(x.shape[0], 4, -1).mean(2))
        return result


class Rotates(nn.Module):
    """Multiplies by complex numbers."""

    turn: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 3)
        self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4.0)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.first(x).unflatten(-1, (4, 2)))
        turned = torch.view_as_real(pairs * self.turn).flatten(-2)
        result: Tensor = self.out(self.second(turned).relu())
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_written_in_fp32_if_need_be(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model, (x, _) = image_net(dtype), images(dtype, 2)
    check = export_onnx(fxprune.trace(model, (x,)), tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    assert check.parity is not None
    assert check.parity <= check.limit
    taken = session.get_inputs()[0].type
    assert (check.note is not None and "FP32" in check.note) == (taken == "tensor(float)")


def test_a_bf16_model_is_compiled(tmp_path: Path) -> None:
    x, y = images(torch.bfloat16)
    done = fxprune.compile(
        image_net(torch.bfloat16), data=(x, y), target="macs=60%", out=tmp_path, **QUICK
    )
    assert done.report.checks["onnx_parity"].passed
    assert (tmp_path / "model.onnx").exists()


def test_state_is_refused_before_any_pass(tmp_path: Path) -> None:
    data = (torch.randn(40, 8), torch.arange(40) % 4)
    with pytest.raises(ExportError, match=r"writes state in forward \(mean\).*--no-onnx"):
        fxprune.compile(Stream().eval(), data=data, out=tmp_path, **QUICK)
    assert not list(tmp_path.iterdir())
    done = fxprune.compile(
        Stream().eval(), data=data, target="macs=50%", out=tmp_path, onnx=False, **QUICK
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.pt2", "recipe.toml", "report.html", "report.json",
    ]  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["after"]["macs"] < report["before"]["macs"]
    assert report["after"]["accuracy"] is not None
    assert report["after"]["latency_ms"] is None
    assert not report["checks"]["onnx_export"]["ran"]
    assert done.report.ok
    assert "onnx = false" in (tmp_path / "recipe.toml").read_text()


@pytest.mark.parametrize(
    ("model", "x"), [(BatchGroups(), torch.randn(3, 3, 8, 8)), (Rotates(), torch.randn(3, 8))]
)
def test_what_cannot_be_written_is_an_error_of_ours(
    model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    program = fxprune.trace(model.eval(), (x,))
    found: Any = None
    try:
        found = export_onnx(program, tmp_path / "a.onnx")
    except ExportError as error:
        found = str(error)
    if isinstance(found, str):
        assert "--no-onnx" in found
        assert "\n" not in found
        assert not list(tmp_path.iterdir())
    else:
        assert found.parity <= found.limit


def test_complex_values_pass_through_the_default_passes() -> None:
    data = (torch.randn(60, 8), torch.arange(60) % 3)
    done = fxprune.compile(Rotates().eval(), data=data, target="macs=60%", onnx=False, **QUICK)
    assert done.report.target_met


@pytest.mark.parametrize("own", [True, False])
def test_a_late_failure_leaves_the_model_and_the_report(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise PostconditionError("it differs") if own else RuntimeError("out of nodes\nat line 3")

    real = candidates._measure
    monkeypatch.setattr(candidates, "export", fail)
    assert candidates._measure is real
    done = fxprune.compile(image_net(), data=images(), target="macs=60%", out=tmp_path, **QUICK)
    assert not done.report.ok
    check = done.report.checks["onnx_export"]
    assert check.passed is False
    assert check.note is not None
    assert ("it differs" if own else "RuntimeError: out of nodes") in check.note
    assert (tmp_path / "model.pt2").exists()
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "model.onnx").exists()
    assert done.report.before.latency_ms is not None
    assert done.report.after.latency_ms is None


@pytest.mark.parametrize(("more", "word"), [({"target": "latency=50%"}, "latency"), ({}, "INT8")])
def test_what_needs_onnx_runtime_is_refused_without_it(more: dict[str, Any], word: str) -> None:
    options = {**QUICK, "int8": word == "INT8", **more}
    with pytest.raises(InputError, match=f"{word}.* in ONNX Runtime"):
        fxprune.compile(image_net(), data=images(), onnx=False, **options)


class Attends(nn.Module):
    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask, self.embed = mask, nn.Embedding(20, 16)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        seen = tokens.ne(0)[:, None, None, :]
        mask = seen & torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        if self.mask == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        for layer in self.qkv:
            q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in layer(x).chunk(3, -1))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + attended.transpose(1, 2).flatten(2)
        result: Tensor = x
        return result


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_queries_that_see_no_key_give_zeros_in_onnx_too(mask: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attends(mask).eval()
    tokens = torch.tensor([[0, 0, 5, 7], [1, 2, 3, 4], [0, 0, 0, 0]])
    program = fxprune.trace(model, (tokens,))
    check = export_onnx(program, tmp_path / "a.onnx")
    assert check.parity is not None
    assert check.parity <= 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    assert torch.from_numpy(found).isfinite().all()
    assert torch.allclose(torch.from_numpy(found), model(tokens), atol=1e-5)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.width, self.out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.mean(x) + self.width(x).exp() * torch.randn_like(self.mean(x))
        result: Tensor = self.out(drawn + torch.rand(1))
        return result


def test_random_draws_are_compared_as_if_they_were_fixed(tmp_path: Path) -> None:
    program = fxprune.trace(Noisy().eval(), (torch.randn(3, 8),))
    check = export_onnx(program, tmp_path / "a.onnx")
    assert (check.parity is not None, check.note) == (True, "compared on fixed random draws")
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    data = (torch.randn(60, 8), torch.arange(60) % 3)
    done = fxprune.compile(Noisy().eval(), data=data, target="macs=50%", **QUICK)
    assert done.report.checks["zero_then_remove"].passed
    assert not done.report.checks["onnx_accuracy"].ran
    assert done.report.ok
