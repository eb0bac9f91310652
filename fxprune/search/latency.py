"""Latency of whole programs in the form that will run: predicted from layers, or measured.

A program in INT8 is a mixture: each layer runs in the form in which the whole takes least time,
conversions between the two counted. Layers that have no INT8 form, such as products of activations,
run in FP32. What is no layer takes time in proportion to the elements that it computes, and a call
has a fixed cost; one measurement of the dense program in the same form gives both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fxprune.graph.program import Program
from fxprune.latency.bench import LAYERS as FP32_LAYERS
from fxprune.latency.bench import calibrate, measure_dense
from fxprune.latency.layer_config import Form
from fxprune.latency.model import Calibration
from fxprune.latency.table import Table
from fxprune.latency.terms import configs_of, elements_of
from fxprune.onnx.benchmark import Shapes, compare
from fxprune.onnx.export import export_onnx
from fxprune.pipeline.context import Context
from fxprune.pipeline.progress import Tracker
from fxprune.quantization.timing import least_us

# Operators of ONNX Runtime whose times the table has, in each form.
LAYERS: Mapping[Form, frozenset[str]] = {
    "fp32": FP32_LAYERS,
    "int8": FP32_LAYERS
    | {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger"}
    | {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeMatMul"},
}
Deploy = Callable[[Program], Program]  # a copy in the form that runs, weights need not be good


@dataclass(eq=False)
class DeployedLatency:
    """Latency of programs in one form on this host.

    Attributes:
        table: times of layers.
        form: FP32, or INT8 wherever that is faster.
        deploy: makes the form of a program that is exported.
        folder: where ``dense.onnx`` is, the dense program in this form.
        dense_ms: its latency.
        how: what makes latencies of layers' times.
        progress: shows the measuring of layers.
        shapes: of inputs, at which latency is measured.

    """

    table: Table
    form: Form
    deploy: Deploy
    folder: Path
    dense_ms: float
    how: Calibration
    progress: Tracker
    shapes: Shapes

    def predict(self, program: Program) -> float:
        """Return a program's milliseconds by the table; layers that it lacks are measured."""
        us = _layers_us(program, self.table, self.form, self.progress)
        return self.how.fixed + self.how.per_us * us + self.how.per_element * elements_of(program)

    def measure(self, program: Program, seconds: float = 2.0) -> float:
        """Return a program's milliseconds, by the median ratio of runs in turns with the dense.

        Another machine is not at hand: there it is what its table predicts.
        """
        if self.table.network is not None:
            return self.predict(program)
        path = self.folder / "small.onnx"
        export_onnx(self.deploy(program), path, check=False)
        files = {"dense": self.folder / "dense.onnx", "small": path}
        host = self.table.host
        found = compare(
            files, threads=host.threads, seconds=seconds, provider=host.provider, shapes=self.shapes
        )
        return self.dense_ms / found["small"].speedup


def open_latency(
    dense: Program, form: Form, deploy: Deploy, folder: Path, context: Context
) -> DeployedLatency:
    """Export the dense program in a form into a folder, measure it, and calibrate the table.

    The table of another machine is calibrated with what the dense program took there in FP32.
    """
    table, progress, shapes = Table.of(context), context.progress, context.latency_shapes
    if (network := table.network) is not None:
        us, elements = _layers_us(dense, table, "fp32", progress), elements_of(dense)
        how = calibrate(network.nodes, network.dense_ms, us, elements)
        us = _layers_us(dense, table, form, progress)
        whole = how.fixed + how.per_us * us + how.per_element * elements
        return DeployedLatency(table, form, deploy, folder, whole, how, progress, shapes)
    whole, nodes = measure_dense(deploy(dense), folder, table.host, shapes)
    us = _layers_us(dense, table, form, progress)
    how = calibrate(nodes, whole, us, elements_of(dense), LAYERS[form])
    return DeployedLatency(table, form, deploy, folder, whole, how, progress, shapes)


def _layers_us(program: Program, table: Table, form: Form, progress: Tracker) -> float:
    """Return the microseconds of a program's layers, conversions between forms included."""
    if form == "int8":
        return least_us(program, table, progress)
    configs = configs_of(program)
    table.fill(configs, progress)
    return float(table.us(configs).sum())
