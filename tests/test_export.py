from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from google.protobuf.message import EncodeError
from hypothesis import given, settings
from strategies import Design, Network, designs
from support import initializer_elements, trace
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
import fxprune.onnx.export
from fxprune.errors import InputError, PostconditionError
from fxprune.graph.program import Program
from fxprune.onnx.benchmark import compare, open_session
from fxprune.onnx.export import export_onnx
from fxprune.onnx.runtime import least_sizes
from fxprune.structure.verify import sample_units


@settings(max_examples=4)
@given(designs(max_steps=4))
def test_onnx_runtime_agrees_before_and_after_removal(
    tmp_path_factory: pytest.TempPathFactory, design: Design
) -> None:
    network = Network(design).float()
    program = trace(network, network.example().float())
    folder = tmp_path_factory.mktemp("onnx")
    assert export_onnx(program, folder / "dense.onnx").parity <= 1e-3  # type: ignore[operator]
    fxprune.remove_units(program, sample_units(fxprune.find_groups(program), 0.5))
    check = export_onnx(program, folder / "small.onnx")
    assert check.parity is not None
    assert check.parity <= 1e-3
    assert check.onnx_bytes == (folder / "small.onnx").stat().st_size
    assert {path.name for path in folder.iterdir()} == {"dense.onnx", "small.onnx"}


class Attends(nn.Module):
    """Attention in one of its several forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.q, self.kv = nn.Linear(8, 16), nn.Linear(8, 2 * (8 if form == "grouped" else 16))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, 4, 4).transpose(1, 2)
        k, v = self.kv(x).view(batch, tokens, 2, -1, 4).permute(2, 0, 3, 1, 4).unbind(0)
        lower = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        match self.form:
            case "causal":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            case "boolean":
                return F.scaled_dot_product_attention(q, k, v, lower)
            case "additive":
                return F.scaled_dot_product_attention(q, k, v, lower.float(), scale=0.3)
            case _:
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.parametrize("form", ["causal", "boolean", "additive", "grouped"])
def test_every_form_of_attention_is_exact(tmp_path: Path, form: str) -> None:
    program = trace(Attends(form), torch.randn(2, 5, 8))
    assert export_onnx(program, tmp_path / "a.onnx").parity <= 1e-5  # type: ignore[operator]


def test_initialisers_shrink_and_the_batch_stays_dynamic(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.Flatten())
    program = trace(model, torch.randn(1, 3, 8, 8))
    export_onnx(program, tmp_path / "dense.onnx")
    fxprune.remove_units(program, sample_units(fxprune.find_groups(program), 0.5))
    export_onnx(program, tmp_path / "small.onnx")
    dense, small = (initializer_elements(tmp_path / f"{name}.onnx") for name in ("dense", "small"))
    assert small < 0.55 * dense
    batch = onnx.load(tmp_path / "small.onnx").graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param
    assert not batch.dim_value


def test_a_wrong_file_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(program: Program, path: Path, extras: tuple[str, ...] = ()) -> None:
        other = program.copy()
        with torch.no_grad():
            for tensor in other.graph_module.parameters():
                tensor.mul_(0.5)
        write(other, path, extras)

    write = fxprune.onnx.export._write
    monkeypatch.setattr("fxprune.onnx.export._write", half)
    program = trace(nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(PostconditionError, match=r"differs from PyTorch's by 5.00e-01"):
        export_onnx(program, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


class Cancels(nn.Module):
    """The small difference of two large values, of which single precision keeps few digits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(512, 8), nn.Linear(512, 8)
        with torch.no_grad():
            for mine, other in zip(self.second.parameters(), self.first.parameters(), strict=True):
                mine.copy_(other + 1e-6 * torch.randn_like(other))

    def forward(self, x: Tensor) -> Tensor:
        return 100 * self.first(x) - 100 * self.second(x)  # type: ignore[no-any-return]


def test_what_rounding_alone_explains_is_no_wrong_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check = export_onnx(trace(Cancels(), torch.randn(4, 512)), tmp_path / "a.onnx")
    assert check.parity is not None
    assert 1e-3 < check.parity <= check.limit < 1
    assert check.note is not None
    assert "precision" in check.note or "fused" in check.note


def test_latencies_are_compared_in_turns(tmp_path: Path) -> None:
    for name, width in (("wide", 512), ("thin", 16)):
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 512))
        export_onnx(trace(model, torch.randn(2, 64)), tmp_path / f"{name}.onnx")
    paths = {name: tmp_path / f"{name}.onnx" for name in ("wide", "thin")}
    found = compare(paths, seconds=0.1, minimum=5)
    assert list(found) == ["wide", "thin"]
    assert found["wide"].runs == found["thin"].runs >= 5
    assert found["wide"].speedup == 1
    assert all(time.p10_ms <= time.median_ms <= time.p90_ms for time in found.values())


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match="ONNX Runtime cannot load"):
        compare({"a": tmp_path / "a.onnx"})
    with pytest.raises(InputError, match="there is no file"):
        compare({"b": tmp_path / "b.onnx"})


def test_what_one_file_cannot_hold_is_written_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.onnx.ONNXProgram.save

    def limited(self: Any, path: str, *, external_data: bool | None = None) -> None:
        if not external_data:
            raise EncodeError("Failed to serialize proto")
        save(self, path, external_data=external_data)

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", limited)
    check = fxprune.export_onnx(trace(nn.Linear(64, 64), torch.randn(2, 64)), tmp_path / "m.onnx")
    assert check.parity is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert check.onnx_bytes >= 4 * 64 * 64
    assert open_session(tmp_path / "m.onnx", 1).get_inputs()


def test_small_values_of_a_sigmoid_are_compared_with_its_range(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 1), nn.Sigmoid(), nn.Flatten(0))
    nn.init.constant_(model[0].bias, -15.5)  # type: ignore[arg-type]
    program = trace(model, torch.randn(1, 6))
    assert program(torch.randn(1, 6)).detach().max() < 1e-5
    check = fxprune.export_onnx(program, tmp_path / "m.onnx")
    assert check.parity is not None
    assert check.parity <= 1e-6
    assert least_sizes(program) == [1.0]
    assert least_sizes(trace(nn.Linear(6, 1), torch.randn(1, 6))) == [0.0]
