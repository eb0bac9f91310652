from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from fxprune.data.images import Scaling, read_image
from fxprune.models.compat import enable_torchvision
from tools.coverage_compile import examine_compile, make_photos, run_command, small_input
from tools.coverage_table import markdown

enable_torchvision()
SMALL = ("timm:test_vit",)


@pytest.mark.parametrize("arch", SMALL)
def test_the_command_compiles_a_library_model_for_photos(arch: str) -> None:
    suite, _, name = arch.partition(":")
    importlib.import_module(suite)
    steps: list[str] = []
    record = examine_compile(suite, name, 12, lambda told: steps.append(told["compile_step"]))
    assert record["compile_why"] is None
    assert record["compile"] in ("fp32", "int8")
    assert record["compile_macs"] <= 0.606
    assert steps == ["build", "compile"]


def test_photos_have_several_sizes_and_two_classes(tmp_path: Path) -> None:
    make_photos(tmp_path, 6)
    paths = sorted(tmp_path.rglob("*.jpg"))
    assert len(paths) == 6
    assert len({path.parent for path in paths}) == 2
    assert len({read_image(path, Scaling()).shape for path in paths}) > 1


def test_inputs_are_as_small_as_the_model_takes() -> None:
    assert small_input("torchvision:resnet18") == ["--image-size", "64"]
    assert small_input("torchvision:vit_b_32") == [
        "--image-size", "64", "--arch-option", "image_size=64",
    ]  # fmt: skip


def test_a_failing_command_is_a_line_of_the_table(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"nothing")
    make_photos(tmp_path / "photos", 4)
    record = run_command("torchvision:resnet18", [], tmp_path, "macs=60%")
    assert "fxprune: " in record["compile_why"]
    known = {"suite": "s", "model": "m", "failed": None, "why": None, "compile_s": 3.0}
    page = markdown([{**known, "compile": None, **record}], "the command")
    assert "| fails: fxprune: " in page
    assert "| INT8, 3 s |" in markdown([{**known, "compile": "int8"}], "the command")
