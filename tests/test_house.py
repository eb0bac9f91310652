"""The contract of the layers: nothing imports a higher layer, and no pass imports a pass."""

from __future__ import annotations

import ast

from tools.house import ROOT, cycles, sources, upward


def test_packages_form_no_cycle() -> None:
    assert cycles(sources(ROOT)) == []


def test_no_layer_imports_a_higher_one_and_no_pass_another() -> None:
    assert upward(sources(ROOT)) == []


def test_a_planted_import_is_noticed() -> None:
    modules = sources(ROOT)
    modules["fxprune.graph.planted"] = ast.parse("from fxprune.run.compile import compile")
    modules["fxprune.passes.planted"] = ast.parse("from fxprune.passes.finetune import Finetune")
    assert upward(modules) == [
        ("fxprune.graph.planted", "fxprune.run.compile"),
        ("fxprune.passes.planted", "fxprune.passes.finetune"),
    ]
    assert any("graph" in circle for circle in cycles(modules))
