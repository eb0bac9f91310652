from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fxprune.graph.cost import Cost
from fxprune.graph.facts import SENSITIVITY, Plan, Sensitivity
from fxprune.graph.program import Program
from fxprune.graph.trace import trace
from fxprune.passes import AnnotateSensitivity, RemoveChannels
from fxprune.pipeline.contract import Outcome, ReportTable, Skip
from fxprune.pipeline.driver import Entry
from fxprune.run.checkpoint import FOLDER, Checkpoint, Journal, fingerprint, resumable

COST = Cost(1, 2, 3)


@pytest.fixture
def program() -> Program:
    return trace(nn.Linear(3, 2), (torch.ones(1, 3),))


def journal(program: Program) -> Journal:
    program.put(SENSITIVITY, Sensitivity("l2", {"a": torch.arange(200).flip(0) / 2.0}))
    found = Journal()
    annotate, remove = AnnotateSensitivity(), RemoveChannels()
    table = ReportTable("scores", ("group", "mean"), (("a", "1.0"),))
    outcome = Outcome(
        0, (Skip("b", "no score"),), {"samples": 3}, ("few samples",), (table,), {"macs": 1.5}
    )
    found.add(annotate, Entry(str(annotate), 1.5, outcome, COST, COST), program, None)
    plan = Plan({"a": (1, 5, 6), "c": ()})
    found.add(remove, Entry(str(remove), 0.5, Outcome(3), COST, COST), program, plan)
    return found


def test_the_journal_tells_what_was_removed(program: Program) -> None:
    found = journal(program)
    assert found.removed == {"a": 3, "c": 0}
    curve = found.curves["a"]
    assert (len(curve), curve[0], curve[-1]) == (64, 0.0, 99.5)
    assert list(curve) == sorted(curve)


def test_what_is_kept_comes_back(program: Program, tmp_path: Path) -> None:
    specs = ("annotate-sensitivity", "remove-channels", "fold-batchnorm")
    kept = Checkpoint(tmp_path, "abc", specs)
    assert kept.load() is None
    found = journal(program)
    kept.save(program, found)
    kept.save(program, found)
    state = tmp_path / FOLDER / "state.json"
    assert len(list(state.parent.iterdir())) == 2
    loaded = kept.load()
    assert loaded is not None
    again, entries = loaded
    assert entries == found
    assert torch.equal(again.tensor("weight"), program.tensor("weight"))
    assert again.get(SENSITIVITY).criterion == "l2"
    assert json.loads(state.read_text())["fingerprint"] == "abc"
    kept.drop()
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_follows_weights_graph_and_options(program: Program) -> None:
    first = fingerprint(program, (1, "a"))
    assert first == fingerprint(program.copy(), (1, "a"))
    assert first != fingerprint(program, (2, "a"))
    other = program.copy()
    with torch.no_grad():
        other.tensor("bias")[0] += 1e-6
    assert first != fingerprint(other, (1, "a"))


def test_without_a_folder_nothing_is_kept(program: Program) -> None:
    nowhere = Checkpoint.none()
    nowhere.save(program, journal(program))
    assert not nowhere.exists
    assert nowhere.load() is None
    nowhere.drop()


def test_a_failure_says_that_finished_passes_are_kept(program: Program, tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path, "abc", ())
    with pytest.raises(KeyError) as early, resumable(kept):
        raise KeyError
    kept.save(program, Journal())
    with pytest.raises(KeyError) as late, resumable(kept):
        raise KeyError
    assert not hasattr(early.value, "__notes__")
    assert "--resume" in late.value.__notes__[0]
