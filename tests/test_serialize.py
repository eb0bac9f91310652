from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from strategies import Design, Network, designs
from support import trace
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError
from fxprune.graph import serialize
from fxprune.graph.facts import MASKS, PLAN, Masks, Plan
from fxprune.graph.text import graph_text
from fxprune.structure.verify import sample_units


@given(designs(max_steps=4))
def test_a_loaded_program_is_the_saved_one(
    tmp_path_factory: pytest.TempPathFactory, design: Design
) -> None:
    network = Network(design)
    program = trace(network, network.example())
    fxprune.remove_units(program, sample_units(fxprune.find_groups(program), 0.5))
    path = tmp_path_factory.mktemp("saved") / "model.pt2"
    serialize.save(program, path)
    loaded = serialize.load(path)
    assert graph_text(loaded) == graph_text(program)
    assert torch.equal(loaded(network.example(3)), program(network.example(3)))
    assert loaded.facts.keys() == program.facts.keys()


class Tied(nn.Module):
    """Shared weights, two inputs, a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, tokens: Tensor, scale: Tensor) -> dict[str, Any]:
        x = self.table(tokens) * self.frozen * scale[:, None, None]
        return {"logits": self.head(x), "states": [x, x.mean(1)]}


def saved_tied(folder: Path) -> tuple[fxprune.Program, Path]:
    program = trace(Tied(), torch.zeros(2, 4, dtype=torch.long), torch.ones(2))
    program.put(PLAN, Plan({"a": (1, 2)}, notes=("said",), predicted={"macs": float("inf")}))
    program.put(MASKS, Masks({"head.weight": torch.eye(2, dtype=torch.bool)}, "2:4"))
    serialize.save(program, folder / "model.pt2")
    return program, folder / "model.pt2"


def test_ties_flags_facts_and_structure_survive(tmp_path: Path) -> None:
    program, path = saved_tied(tmp_path)
    loaded = serialize.load(path)
    assert loaded.tensor("head.weight") is loaded.tensor("table.weight")
    assert not loaded.tensor("frozen").requires_grad
    assert isinstance(loaded.tensor("table.weight"), nn.Parameter)
    assert loaded.get(PLAN) == program.get(PLAN)
    assert torch.equal(loaded.get(MASKS).keep["head.weight"], torch.eye(2, dtype=torch.bool))
    inputs = torch.arange(12).view(3, 4) % 11, torch.tensor([1.0, 2.0, 3.0])
    found, expected = loaded(*inputs), program(*inputs)
    assert found.keys() == expected.keys()
    assert torch.equal(found["states"][1], expected["states"][1])


def test_the_same_program_gives_the_same_bytes(tmp_path: Path) -> None:
    program, path = saved_tied(tmp_path)
    serialize.save(program, tmp_path / "again.pt2")
    assert (tmp_path / "again.pt2").read_bytes() == path.read_bytes()


def test_a_loaded_program_learns(tmp_path: Path) -> None:
    loaded = serialize.load(saved_tied(tmp_path)[1])
    loaded(torch.zeros(2, 4, dtype=torch.long), torch.ones(2))["logits"].sum().backward()
    assert loaded.tensor("table.weight").grad is not None


def edited(path: Path, change: Any) -> Path:
    """Copy a saved program with its description changed."""
    with zipfile.ZipFile(path) as archive:
        content = json.loads(archive.read(serialize.GRAPH))
        tensors = archive.read(serialize.TENSORS)
    change(content)
    out = path.with_name("edited.pt2")
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(serialize.GRAPH, json.dumps(content))
        archive.writestr(serialize.TENSORS, tensors)
    return out


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "aten.__class__.default", "operator.attrgetter", "torch.load"],
)
def test_a_file_cannot_name_what_is_not_an_operator(tmp_path: Path, target: str) -> None:
    def change(content: dict[str, Any]) -> None:
        calls = [node for node in content["nodes"] if node["op"] == "call_function"]
        calls[0]["target"] = target

    with pytest.raises(InputError, match="is not a known operator"):
        serialize.load(edited(saved_tied(tmp_path)[1], change))


def test_a_file_cannot_bring_other_kinds_of_nodes(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["nodes"][0]["op"] = "call_module"

    with pytest.raises(InputError, match="unknown kind call_module"):
        serialize.load(edited(saved_tied(tmp_path)[1], change))


def test_other_formats_are_refused(tmp_path: Path) -> None:
    path = edited(saved_tied(tmp_path)[1], lambda content: content.update(format=99))
    with pytest.raises(InputError, match="has the format 99"):
        serialize.load(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = saved_tied(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InputError, match="not a complete fxprune program"):
        serialize.load(path)
    with pytest.raises(InputError, match="there is no file"):
        serialize.load(tmp_path / "absent.pt2")
