"""Latency in ONNX Runtime, of several models in one interleaved run.

The speed of a machine drifts with its clock, its caches and its other processes. Models that run in
turns drift together, so the ratio of neighbouring runs is reliable. With one thread, processor time
is measured: on an idle machine it equals the elapsed time; on a busy one it excludes the time of
other processes. If the processor's clock has stood still, as it may on a virtual machine, elapsed
time is used.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from fxprune.errors import InputError

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class Latency:
    """Latency of one model, in milliseconds per run.

    Attributes:
        median_ms: the median.
        p10_ms: the tenth percentile.
        p90_ms: the ninetieth percentile.
        runs: number of timed runs.
        speedup: the median, over runs, of the first model's time divided by this one's.
        speedup_p10: the tenth percentile of this ratio.
        speedup_p90: the ninetieth percentile of this ratio.

    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    speedup: float
    speedup_p10: float
    speedup_p90: float


def compare(
    models: Mapping[str, str | Path],
    *,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 2.0,
    minimum: int = 20,
) -> dict[str, Latency]:
    """Time models in turns, A B A B ..., on random inputs of their input shapes.

    Args:
        models: ONNX files by name; speed-ups compare with the first.
        batch: size of dynamic dimensions.
        threads: intra-operator threads of ONNX Runtime.
        seconds: duration of the measurement, without warm-up.
        minimum: smallest number of rounds, whatever their duration.

    """
    sessions = {name: open_session(path, threads) for name, path in models.items()}
    inputs = {name: random_inputs(session, batch) for name, session in sessions.items()}
    for name, session in sessions.items():  # warm-up: memory allocation and code paths
        for _ in range(3):
            session.run(None, inputs[name])
    times: dict[str, list[float]] = {name: [] for name in sessions}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < minimum or (time.perf_counter() < end and rounds < 5000):
        for name, session in sessions.items():
            passed, worked = time.perf_counter(), time.thread_time()
            session.run(None, inputs[name])
            worked, passed = time.thread_time() - worked, time.perf_counter() - passed
            times[name].append(1000 * (worked if threads == 1 and worked > 0 else passed))
        rounds += 1
    first = np.array(next(iter(times.values())))
    return {name: _summary(np.array(own), first) for name, own in times.items()}


def _summary(times: Any, first: Any) -> Latency:
    low, median, high = np.percentile(times, [10, 50, 90])
    ratio_low, ratio, ratio_high = np.percentile(first / times, [10, 50, 90])
    return Latency(
        float(median), float(low), float(high), len(times), float(ratio), float(ratio_low),
        float(ratio_high),
    )  # fmt: skip


def open_session(
    model: bytes | str | Path, threads: int, *, profile_to: Path | None = None
) -> onnxruntime.InferenceSession:
    """Open a model with the settings of a latency measurement.

    Args:
        model: an ONNX file, or its content.
        threads: intra-operator threads.
        profile_to: start a profile; the name of its file starts with this path.

    Raises:
        InputError: there is no such file, or ONNX Runtime cannot load it.

    """
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise InputError(f"there is no file {model}; give the path of an ONNX model")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors have no common base
        what = "a model" if isinstance(model, bytes) else str(model)
        raise InputError(
            f"ONNX Runtime cannot load {what}: {str(error).splitlines()[0]}; check that it is a "
            "complete ONNX model"
        ) from error


def random_inputs(session: onnxruntime.InferenceSession, batch: int) -> dict[str, Any]:
    """Return seeded random inputs for a session; dynamic sizes become ``batch``."""
    random = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for item in session.get_inputs():
        shape = [size if isinstance(size, int) else batch for size in item.shape]
        dtype = DTYPES.get(item.type)
        if dtype is None:
            raise InputError(
                f"input {item.name} has the type {item.type}, for which there are no random inputs"
            )
        if np.issubdtype(dtype, np.floating):
            made[item.name] = random.standard_normal(shape).astype(dtype)
        else:
            made[item.name] = random.integers(0, 2, shape).astype(dtype)
    return made
