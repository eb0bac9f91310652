from __future__ import annotations

import json
import operator
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fxprune.errors import InputError
from fxprune.graph.archive_check import check_exported
from fxprune.graph.program import Program
from fxprune.models.loading import build, load_model

ARCH = "architectures_for_test:small"
SOURCE = """
from torch import nn
def small(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(),
                         nn.Linear(width * 4, 5))
def nothing():
    return 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current directory, which holds a module with a factory."""
    (tmp_path / "architectures_for_test.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("architectures_for_test", None)
    return tmp_path


def small() -> nn.Module:
    torch.manual_seed(0)
    return build(ARCH, {}).eval()


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def same(loaded: nn.Module | Program, model: nn.Module) -> bool:
    return torch.equal(loaded(X), model(X))


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        prefixed,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": prefixed(state), "optimizer": {}},
        lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    ],
)
def test_state_dicts_and_their_wrappers(place: Path, wrap: Callable[..., Any]) -> None:
    model = small()
    torch.save(wrap(model.state_dict()), "m.pt")
    loaded = load_model("m.pt", ARCH)
    assert isinstance(loaded, nn.Module)
    assert not loaded.training
    assert same(loaded, model)


def test_safetensors_and_options(place: Path) -> None:
    model = build(ARCH, {"width": 6}).eval()
    save_file(model.state_dict(), "m.safetensors")
    assert same(load_model("m.safetensors", ARCH, options={"width": 6}), model)


def test_a_state_dict_needs_an_architecture(place: Path) -> None:
    torch.save(small().state_dict(), "m.pt")
    with pytest.raises(InputError, match="holds weights only"):
        load_model("m.pt")


def test_mismatches_are_named(place: Path) -> None:
    state = small().state_dict()
    state["extra"] = state.pop("0.bias")
    state["3.weight"] = torch.zeros(5, 17)
    torch.save(state, "m.pt")
    with pytest.raises(InputError) as caught:
        load_model("m.pt", ARCH)
    message = str(caught.value)
    assert "3.weight (file 5x17, model 5x16)" in message
    assert "1 missing from the file: 0.bias" in message
    assert "1 not in the model: extra" in message


def test_a_dictionary_without_weights_is_told(place: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, "m.pt")
    with pytest.raises(InputError, match="dictionary of epoch, lr"):
        load_model("m.pt", ARCH)


def test_a_pickled_module_needs_consent(place: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    torch.save(model, "m.pt")
    with pytest.raises(InputError, match="--trust-pickle"):
        load_model("m.pt")
    assert same(load_model("m.pt", trust_pickle=True), model)


class Bomb:
    """Creates a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


def test_a_hostile_pickle_does_not_run(place: Path) -> None:
    torch.save({"state_dict": Bomb()}, "m.pt")
    with pytest.raises(InputError, match="--trust-pickle"):
        load_model("m.pt", ARCH)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "pt2"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_truncated_files_are_told(place: Path, suffix: str, share: float) -> None:
    model, path = small(), Path(f"m.{suffix}")
    match suffix:
        case "pt":
            torch.save(model.state_dict(), path)
        case "safetensors":
            save_file(model.state_dict(), path)
        case _:
            torch.export.save(exported(model), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="empty" if share == 0 else "cannot be read"):
        load_model(path, ARCH)


def test_missing_files_and_directories_are_told(place: Path) -> None:
    Path("model.pt").touch()
    with pytest.raises(InputError, match=r"no file modle\.pt; did you mean model\.pt"):
        load_model("modle.pt")
    with pytest.raises(InputError, match="is a directory"):
        load_model(place)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet18", "torchvision:resnet18"),
        ("architectures_for_test:smal", "did you mean small"),
        ("no_such_module_at_all:make", "no module no_such_module_at_all"),
        ("architectures_for_test:nothing", "returns a int"),
    ],
)
def test_unknown_architectures_are_told(place: Path, arch: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(arch, {})


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_libraries_are_found_and_nearest_names_told(library: str) -> None:
    pytest.importorskip("PIL")
    try:
        model = build(f"{library}:resnet18", {"num_classes": 7})
    except InputError as error:
        pytest.skip(str(error))
    assert model.state_dict()["fc.weight"].shape == (7, 512)
    with pytest.raises(InputError, match="did you mean resnet18"):
        build(f"{library}:resnet_18", {})


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim.DYNAMIC}
    return torch.export.export(model, (X,), dynamic_shapes=(batch,), strict=False)


def test_an_exported_program_runs_at_any_batch(place: Path) -> None:
    model = small()
    torch.export.save(exported(model), "m.pt2")
    program = load_model("m.pt2")
    assert isinstance(program, Program)
    assert same(program, model)
    assert program(X[:1]).shape == (1, 5)


class Sizes(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"a": x.reshape(-1, 2 * x.shape[1]) + 1, "b": [torch.einsum("ij,j->i", x, y)]}


def test_expressions_guards_and_containers_are_admitted(place: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    shapes = ({0: 2 * batch}, None)
    program = torch.export.export(
        Sizes(), (torch.randn(4, 3), torch.randn(3)), dynamic_shapes=shapes, strict=False
    )
    torch.export.save(program, "m.pt2")
    check_exported(Path("m.pt2"))


def rewritten(path: Path, change: Callable[[str, bytes], bytes], extra: str = "") -> None:
    """Write an archive anew, every file changed."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, change(name, content))
        if extra:
            archive.writestr(extra, b"")


def in_graph(old: str, new: str) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        assert old in content.decode()
        changed = content.decode().replace(old, json.dumps(new)[1:-1])
        json.loads(changed)
        return changed.encode()

    return change


EVIL = "__import__('pathlib').Path('exploded').touch()"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Symbol('s77', positive=True, integer=True)", EVIL),
        ("Symbol('s77', positive=True, integer=True)", "Symbol.__class__"),
        ("Symbol('s77', positive=True, integer=True)", "eval('1')"),
        ("torch.ops.aten.linear.default", "torch.os.system"),
        ("torch.ops.aten.linear.default", "torch.ops.load_library"),
        ("torch.ops.aten.linear.default", "torch.ops.load_library.__call__"),
        ("torch.ops.aten.linear.default", "torch.ops.aten.from_file.default"),
        ("torch.ops.aten.linear.default", "torch.ops.aten.__class__.mro"),
        ("torch.ops.aten.linear.default", "_operator.methodcaller"),
        ("torch.ops.aten.linear.default", "#extension:anything"),
        ("torch.ops.aten.linear.default", "torch.hub.load"),
        ('"name": "input"', f"x={EVIL}"),
    ],
)
def test_archives_that_could_run_code_are_refused(place: Path, old: str, new: str) -> None:
    torch.export.save(exported(small()), "m.pt2")
    with zipfile.ZipFile("m.pt2") as archive:
        graph = archive.read("m/models/model.json").decode()
    if old.startswith('"name"'):
        argument = json.loads(graph)["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"]
        old = argument
    elif old.startswith("Symbol"):
        old = old if old in graph else next(iter(expressions(json.loads(graph))))
    rewritten(Path("m.pt2"), in_graph(old, new))
    with pytest.raises(InputError, match="is refused: its graph holds"):
        load_model("m.pt2")
    assert not Path("exploded").exists()


def expressions(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["expr_str"]] if isinstance(value.get("expr_str"), str) else []
        return own + [text for item in value.values() for text in expressions(item)]
    return [text for item in value for text in expressions(item)] if isinstance(value, list) else []


def pickled_weight(name: str, content: bytes) -> bytes:
    if not name.endswith("model_weights_config.json"):
        return content
    return content.replace(b'"use_pickle": false', b'"use_pickle": true')


def pickled_sample(name: str, content: bytes) -> bytes:
    if not name.endswith("sample_inputs/model.pt"):
        return content
    torch.save(((Bomb(),), {}), "sample.pt")
    return Path("sample.pt").read_bytes()


@pytest.mark.parametrize(
    ("change", "extra", "message"),
    [
        (pickled_weight, "", "stored as a pickle"),
        (pickled_sample, "", "sample inputs are not plain"),
        (lambda _, content: content, "m/data/constants/opaque_obj_0", "holds m/data/constants"),
        (lambda _, content: content, "m/data/constants/custom_obj_0", "holds m/data/constants"),
        (lambda _, content: content, "m/data/aotinductor/model/a.so", "holds m/data/aotinductor"),
        (lambda _, content: content, "m/data/weights/model.pt", "holds m/data/weights/model.pt"),
        (lambda _, content: content, "version", "holds version"),
    ],
)
def test_archives_with_pickles_or_binaries_are_refused(
    place: Path, change: Callable[[str, bytes], bytes], extra: str, message: str
) -> None:
    torch.export.save(exported(small()), "m.pt2")
    rewritten(Path("m.pt2"), change, extra)
    with pytest.raises(InputError, match=message):
        load_model("m.pt2")
    assert not Path("exploded").exists()


def test_the_attack_that_is_refused_is_real(place: Path) -> None:
    """Without the check, loading evaluates what a size says; the refusal is worth its price."""
    torch.export.save(exported(small()), "m.pt2")
    with zipfile.ZipFile("m.pt2") as archive:
        graph = json.loads(archive.read("m/models/model.json"))
    rewritten(Path("m.pt2"), in_graph(expressions(graph)[0], EVIL))
    with pytest.raises(InputError):
        load_model("m.pt2", trust_pickle=True)
    assert Path("exploded").exists()


def test_arithmetic_is_an_operator_and_setitem_is_not() -> None:
    from fxprune.graph.archive_check import _is_operator

    assert _is_operator("_operator.mul")
    assert _is_operator("torch.ops.aten.sym_size.int")
    assert hasattr(operator, "setitem")
    assert not _is_operator("_operator.setitem")
