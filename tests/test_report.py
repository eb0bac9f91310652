from __future__ import annotations

import json
import re
from io import StringIO
from xml.etree import ElementTree

import numpy as np
from rich.console import Console

from fxprune.graph.cost import Cost
from fxprune.pipeline.contract import Outcome, ReportTable, Skip
from fxprune.pipeline.driver import Entry
from fxprune.planning.search import Trial
from fxprune.report.content import (
    Check,
    GroupEntry,
    Measures,
    RunReport,
    TargetEntry,
    environment,
)
from fxprune.report.html import to_html
from fxprune.report.table import print_report

KEYS = {"before", "after", "target", "target_met", "passes", "checks", "groups", "environment"}


def report(*, met: bool = True, passed: bool = True) -> RunReport:
    skips = (Skip("add <3>", "its input is not a convolution"),)
    rows = tuple((f"layer {number}", f"{number}.5") for number in range(9))
    tables = (ReportTable("Times <of layers>", ("layer", "us"), rows),)
    details = {"loss": [float("nan"), np.float32(0.5)], "odd": object}
    scored = Outcome(tables=tables, notes=("few samples",), predicted={"macs": 500.0})
    entries = (
        Entry("score{probes=8}", 1.25, scored, Cost(100, 1000, 400), Cost(100, 1000, 400)),
        Entry("cut", 0.5, Outcome(4, skips, details), Cost(100, 1000, 400), Cost(60, 500, 240)),
    )
    return RunReport(
        Measures(100, 1000, 400, 900, 2.0, 0.9),
        Measures(60, 500, 240, None, None, 0.875),
        (TargetEntry("macs=50%", 500.0, 500.0 if met else 600.0, met),),
        entries,
        {
            "zero_then_remove": Check.of(1e-7 if passed else 1e-2, 1e-5, "12 units"),
            "onnx_parity": Check.skipped("not asked for"),
        },
        (
            GroupEntry("conv.weight:0", ("conv.weight:0", "bn.bias:0"), 16, 4),
            GroupEntry("head.weight:0", ("head.weight:0",), 10, frozen_because="the output <y>"),
        ),
        environment("cpu", 3, 1),
        ("no evaluation data was given",),
        {"conv.weight:0": (1e-9, 1e-3, 1.0), "head.weight:0": (0.0, 0.0)},
        (1.2, 1.5, 1.9),
        2.0,
        (
            Trial("macs=25%", 0.25, 30, 250, 0.5, 40.0, False, 1.0),
            Trial("macs=1%", 0.01, None, None, None, None, False, 1.0, "too small"),
        ),
    )


def test_json_has_the_stable_keys() -> None:
    content = json.loads(report().to_json())
    assert set(content) >= KEYS
    assert content["before"] == {
        "params": 100, "macs": 1000, "weight_bytes": 400, "onnx_bytes": 900, "latency_ms": 2.0,
        "accuracy": 0.9,
    }  # fmt: skip
    assert content["after"]["latency_ms"] is None
    assert (content["target"], content["target_met"]) == ("macs=50%", True)
    assert content["passes"][1] == {
        "spec": "cut", "seconds": 0.5, "changes": 4, "params": 60, "macs": 500,
        "skipped": [{"node": "add <3>", "reason": "its input is not a convolution"}],
        "details": {"loss": [None, 0.5], "odd": "<class 'object'>"},
        "notes": [], "tables": [], "predicted": {},
    }  # fmt: skip
    assert content["passes"][0]["tables"][0]["rows"][8] == ["layer 8", "8.5"]
    assert content["passes"][0]["notes"] == ["few samples"]
    assert content["passes"][0]["predicted"] == {"macs": 500.0}
    assert content["checks"]["onnx_parity"] == {
        "ran": False, "passed": None, "value": None, "limit": None, "note": "not asked for",
    }  # fmt: skip
    assert content["groups"][0]["removed"] == 4
    assert content["environment"]["seed"] == 3


def test_ok_needs_the_target_and_every_check_that_ran() -> None:
    assert report().ok
    assert not report(met=False).ok
    assert not report(passed=False).ok
    assert report(passed=False).target_met


def test_a_value_that_is_no_number_fails_its_check() -> None:
    assert Check.of(float("nan"), 1.0).passed is False


def test_the_table_tells_all() -> None:
    out = StringIO()
    print_report(report(met=False), Console(file=out, width=120))
    text = out.getvalue()
    lines = {line.partition("  ")[0]: " ".join(line.split()) for line in text.splitlines()}
    assert lines["parameters"] == "parameters 100 60 60.0 % of before"
    assert lines["latency, ms"] == "latency, ms 2.000 - 1.50x as fast (1.20 to 1.90)"
    assert lines["accuracy"] == "accuracy 90.00 % 87.50 % -2.50 points"
    assert "target macs=50%: 600 (limit 500), NOT MET" in text
    assert "zero_then_remove: 1e-07, limit 1e-05 (12 units), passed" in text
    assert "onnx_parity: not run (not asked for)" in text
    assert lines["macs=25%"] == "macs=25% 1.0 250 50.00 % +40.00 points"
    assert lines["macs=1%"] == "macs=1% 1.0 - - cannot be met"
    assert "note: no evaluation data was given" in text
    assert "Times <of layers> (6 of 9, all in report.html)" in text
    assert lines["layer 5"] == "layer 5 5.5"
    assert "layer 6" not in text


def test_html_is_well_formed_and_self_contained() -> None:
    page = to_html(report())
    body = re.sub(r"<!doctype html>|<meta[^>]*>|<br>|<style>.*?</style>", "", page, flags=re.S)
    root = ElementTree.fromstring(body)
    assert len(root.findall(".//polyline")) == 2
    widths = [float(bar.get("width", "")) for bar in root.findall(".//td/svg/rect[@class='r']")]
    assert widths == [100.0]  # 4 of 16 units on a bar of 400
    assert "the output &lt;y&gt;" in page
    assert "Times &lt;of layers&gt;" in page
    assert "<td>layer 8</td>" in page
    assert not re.search(r"(src|href)=|@import|url\(", page)


def test_html_of_an_empty_report() -> None:
    empty = RunReport(Measures(), Measures(), (), (), {}, (), {})
    assert "No target was set" in to_html(empty)
    assert empty.target_met is None
    assert empty.ok
