"""A table of how long ONNX Runtime takes for single layers on this host.

Many layers share a session whose profile tells the time of each. A layer's input is written just
before it runs, and the sessions are about as large as a network's working set, so caches are as
they would be in a network. Costs of calling a session and of reordering its inputs are left out.

A host's clock is not the same at all times. Every session runs a few layers that are the same in
all of them, the anchors, and its times are scaled to what those took when the table was begun.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from fxprune.errors import FxpruneError
from fxprune.latency import cache as latency_cache
from fxprune.latency.cache import Host, Timing
from fxprune.latency.layers import Kind
from fxprune.latency.profile import profile
from fxprune.progress import Tracker

OPSET = 20
RUNS = 8
SWEEPS = 3
SESSION_BYTES = 8 * 2**20  # of weights and activations in one session, about what caches hold


@dataclass(frozen=True, order=True)
class Shape:
    """A layer with all its sizes; see ``fxprune.latency.layers.Layer``."""

    kind: Kind
    geometry: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def key(self) -> str:
        """Its name in the table."""
        return f"{self.kind} {list(self.geometry)} {list(self.dims)}".replace(", ", ",")

    @property
    def operands(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of what it reads: the input, and the weight or right matrix."""
        if self.kind == "linear":
            rows, inputs, outputs = self.dims
            return (rows, inputs), (inputs, outputs)
        if self.kind == "matmul":
            *leading, rows, inner, columns = self.dims
            right = (inner, columns) if self.geometry[1] else (*leading, inner, columns)
            return (*leading, rows, inner), right
        rank = len(self.geometry) // 7
        channels, outputs, per_group = self.dims
        first = outputs if self.kind == "conv" else channels
        spatial, kernel = self.geometry[:rank], self.geometry[rank : 2 * rank]
        return (1, channels, *spatial), (first, per_group, *kernel)

    @property
    def constant(self) -> bool:
        """Whether the second operand is a weight."""
        return self.kind != "matmul" or bool(self.geometry[1])

    @property
    def elements(self) -> int:
        """About how many numbers it reads and writes."""
        left, right = self.operands
        return 2 * math.prod(left) + math.prod(right)


_CONVOLUTION = (3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0)  # 3 x 3, padded by one
ANCHORS = (
    Shape("conv", (32, 32, *_CONVOLUTION), (16, 16, 16)),
    Shape("conv", (14, 14, *_CONVOLUTION), (96, 96, 1)),
    Shape("conv", (8, 8, *_CONVOLUTION), (64, 64, 64)),
    Shape("linear", (), (16, 256, 256)),
)


@dataclass(eq=False)
class Table:
    """Times of layers on one host; what is missing is measured on demand.

    Attributes:
        host: whose times they are.
        path: where they are kept; None keeps nothing.
        times: by ``Shape.key``.
        used: what was asked for since the table was opened.
        notes: what the report should tell about the file.

    """

    host: Host
    path: Path | None
    times: dict[str, Timing] = field(default_factory=dict)
    used: set[Shape] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, threads: int = 1, path: Path | None = None) -> Table:
        """Open the table of this host, by default the one in the user's cache folder."""
        host = Host.here(threads)
        path = path or host.path
        times, note = latency_cache.load(path)
        return cls(host, path, times, notes=[note] if note else [])

    def fill(self, shapes: Iterable[Shape], progress: Tracker | None = None) -> int:
        """Measure those of the shapes that are not in the table; return how many."""
        asked = set(shapes)
        self.used |= asked
        unknown = sorted(shape for shape in asked if shape.key not in self.times)
        if not unknown:
            return 0
        fresh = self._anchors()
        missing = [shape for shape in unknown if shape not in ANCHORS]
        parts = sessions(missing) * SWEEPS
        tracked = (progress or Tracker(shown=False)).track(
            parts, "measuring layers in ONNX Runtime", total=len(parts)
        )
        found: dict[str, list[float]] = {}
        for part in tracked:
            times = measure([*ANCHORS, *part], self.host.threads)
            drift = np.median([self.times[one.key].us / times[one.key] for one in ANCHORS])
            for shape in part:
                found.setdefault(shape.key, []).append(float(drift * times[shape.key]))
        fresh |= _timings(found)
        self.times |= fresh
        if self.path is not None:
            note = latency_cache.save(self.path, self.host, fresh)
            self.notes += [note] if note else []
        return len(unknown)

    def _anchors(self) -> dict[str, Timing]:
        """Begin the table with the times of the anchors; return those that it did not have."""
        if all(one.key in self.times for one in ANCHORS):
            return {}
        sweeps = [measure(ANCHORS, self.host.threads) for _ in range(SWEEPS)]
        fresh = _timings({one.key: [sweep[one.key] for sweep in sweeps] for one in ANCHORS})
        self.times |= fresh
        return fresh

    def us(self, shapes: Sequence[Shape]) -> Any:
        """Return the microseconds of shapes that are in the table, as an array."""
        return np.array([self.times[shape.key].us for shape in shapes])

    def about(self, shapes: Iterable[Shape]) -> dict[str, float | int | str]:
        """Tell the number, age and noise of the entries used, for the report."""
        used = {shape.key: self.times[shape.key] for shape in shapes}
        noise = float(np.median([one.spread for one in used.values()])) if used else 0.0
        return {
            "entries": len(used),
            "oldest_days": round(latency_cache.age(used), 2),
            "noise": round(noise, 4),
            "cpu": self.host.cpu,
            "onnxruntime": self.host.runtime,
            "threads": self.host.threads,
        }


def _timings(found: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    now = time.time()
    return {
        key: Timing(float(np.median(us)), (max(us) - min(us)) / min(us), now)
        for key, us in found.items()
    }


def sessions(shapes: Sequence[Shape]) -> list[list[Shape]]:
    """Split shapes into parts that fit a session."""
    parts: list[list[Shape]] = []
    room = 0
    for shape in shapes:
        size = 4 * shape.elements
        if size > room:
            parts.append([])
            room = SESSION_BYTES
        parts[-1].append(shape)
        room -= size
    return parts


def measure(shapes: Sequence[Shape], threads: int, runs: int = RUNS) -> dict[str, float]:
    """Time layers in one session: the mean microseconds of the faster half of runs."""
    model = model_of(shapes)
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
        profiled = profile(model, threads, runs, Path(scratch))
    found = {}
    for number, shape in enumerate(shapes):
        names = (f"layer{number}", f"layer{number}_nchwc")
        layer = next((profiled[name] for name in names if name in profiled), None)
        if layer is None:
            raise FxpruneError(
                f"ONNX Runtime's profile has no time for the layer {shape.key}; please report it"
            )
        found[shape.key] = layer.us
    return found


def model_of(shapes: Sequence[Shape]) -> bytes:
    """Build an ONNX model that runs each layer once, on an input of its own shape."""
    random = np.random.default_rng(0)
    nodes, weights, outputs = [], [], []
    inputs: dict[tuple[int, ...], Any] = {}

    def source(shape: tuple[int, ...]) -> str:
        name = "x" + "_".join(map(str, shape))
        inputs[shape] = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        return name

    for number, shape in enumerate(shapes):
        left, right = shape.operands
        name = f"w{number}"
        if shape.constant:
            values = random.standard_normal(right, dtype=np.float32)
            weights.append(numpy_helper.from_array(values, name))
        operands = [source(left), name if shape.constant else source(right)]
        kind, attributes = operator(shape)
        nodes.append(
            helper.make_node(kind, operands, [f"layer{number}"], f"layer{number}", **attributes)
        )
        outputs.append(helper.make_tensor_value_info(f"layer{number}", TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "layers", list(inputs.values()), outputs, weights)
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    encoded: bytes = model.SerializeToString()
    return encoded


def operator(shape: Shape) -> tuple[str, Mapping[str, Any]]:
    """Return a layer's ONNX operator and its attributes."""
    if shape.kind in ("linear", "matmul"):
        return "MatMul", {}
    rank = len(shape.geometry) // 7
    sizes = (rank, rank, rank, 2 * rank, rank, rank)
    starts = np.cumsum((0, *sizes))
    _, kernel, stride, padding, dilation, extra = (
        list(shape.geometry[start : start + size])
        for start, size in zip(starts, sizes, strict=False)
    )
    channels, outputs, per_group = shape.dims
    common = {"kernel_shape": kernel, "strides": stride, "pads": padding, "dilations": dilation}
    if shape.kind == "conv":
        return "Conv", {**common, "group": channels // per_group}
    return "ConvTranspose", {**common, "group": outputs // per_group, "output_padding": extra}
