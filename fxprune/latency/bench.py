"""A latency bench: measure the dense model, and predict or measure others relative to it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fxprune.graph.program import Program
from fxprune.latency.cache import Host
from fxprune.latency.model import Calibration, LatencyLedger
from fxprune.latency.stairs import width_steps
from fxprune.latency.table import Table
from fxprune.latency.terms import configs_of, elements_of, latency_terms
from fxprune.onnx.benchmark import Shapes, compare
from fxprune.onnx.export import export_onnx
from fxprune.onnx.profile import Profiled, profile
from fxprune.pipeline.context import Context
from fxprune.pipeline.progress import Tracker
from fxprune.structure.groups import Group

LAYERS = frozenset(
    {"Conv", "ConvTranspose", "MatMul", "Gemm"} | {"FusedConv", "FusedMatMul", "FusedGemm"}
)
SECONDS = 2.0
RUNS = 30


@dataclass(frozen=True, eq=False)
class Bench:
    """The means to measure and predict latencies.

    Attributes:
        folder: folder of the dense model's ONNX file.
        table: times of layers.
        dense_ms: latency of the dense model, in milliseconds.
        how: conversion from times of layers to a latency, exact for the dense model.
        progress: display of progress while layers are measured.
        shapes: of inputs, at which latency is measured.

    """

    folder: Path
    table: Table
    dense_ms: float
    how: Calibration
    progress: Tracker | None = None
    shapes: Shapes = field(default_factory=dict)

    def ledger(self, program: Program, groups: Sequence[Group]) -> LatencyLedger:
        """Return latency as a function of the number of units removed from each group."""
        terms = latency_terms(program, groups, width_steps(self.table, progress=self.progress))
        self.table.fill((config for term in terms for config in term.configs), self.progress)
        return LatencyLedger.of(terms, len(groups), self.table, self.how)

    def predict(self, program: Program) -> float:
        """Predict a program's milliseconds; the table measures missing layers at their widths."""
        self.table.fill(configs_of(program))
        return self.how.predict(program, self.table)

    def measure(self, program: Program) -> float:
        """Measure a program's milliseconds, interleaved with the dense model.

        The result is the dense latency divided by the median speed-up. Neighbouring runs have the
        same clock; percentiles of each model's own times may not.
        """
        path = self.folder / "small.onnx"
        export_onnx(program, path, check=False)
        files = {"dense": self.folder / "dense.onnx", "small": path}
        host = self.table.host
        found = compare(
            files, threads=host.threads, seconds=SECONDS, provider=host.provider, shapes=self.shapes
        )
        return self.dense_ms / found["small"].speedup


def open_bench(dense: Program, folder: Path, table: Table, context: Context | None = None) -> Bench:
    """Export the dense model into a folder, measure it, and calibrate the table with it.

    A table of another machine has what the dense model took there, and nothing is measured.
    """
    context = context or Context(threads=table.host.threads, progress=Tracker(shown=False))
    shapes = context.latency_shapes
    nodes: Mapping[str, Profiled]
    if table.network is not None:
        whole, nodes = table.network.dense_ms, table.network.nodes
    else:
        whole, nodes = measure_dense(dense, folder, table.host, shapes)
    configs = configs_of(dense)
    table.fill(configs)
    us, elements = float(table.us(configs).sum()), elements_of(dense)
    how = calibrate(nodes, whole, us, elements)
    return Bench(folder, table, whole, how, context.progress, shapes)


def measure_dense(
    dense: Program, folder: Path, host: Host, shapes: Shapes
) -> tuple[float, Mapping[str, Profiled]]:
    """Export a model into a folder; return its milliseconds, and the profile of its nodes."""
    path = folder / "dense.onnx"
    export_onnx(dense, path, check=False)
    threads, provider = host.threads, host.provider
    found = compare(
        {"dense": path}, threads=threads, seconds=SECONDS, provider=provider, shapes=shapes
    )
    with tempfile.TemporaryDirectory(prefix="fxprune-", dir=folder) as scratch:
        nodes = profile(path, threads, RUNS, Path(scratch), provider=provider, shapes=shapes)
    return found["dense"].median_ms, nodes


def calibrate(
    nodes: Mapping[str, Profiled],
    whole: float,
    us: float,
    elements: float,
    layers: frozenset[str] = LAYERS,
) -> Calibration:
    """Split a network's latency into layers, other operators and the rest, as in its profile.

    Args:
        nodes: the profile.
        whole: the latency, in milliseconds.
        us: the time of its layers by the table, in microseconds.
        elements: number of elements computed outside of layers.
        layers: the operators that are layers.

    """
    in_layers = sum(node.us for node in nodes.values() if node.operator in layers) / 1e3
    total = sum(node.us for node in nodes.values()) / 1e3
    scale = min(1.0, whole / total) if total else 1.0  # a profile's own cost is not the network's
    per_us = scale * in_layers / us if us else 0.0
    per_element = scale * (total - in_layers) / elements if elements else 0.0
    return Calibration(per_us, per_element, whole - per_us * us - per_element * elements)
