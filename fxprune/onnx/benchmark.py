"""Latency in ONNX Runtime, of several models in one interleaved run.

Machines drift: clocks, neighbours, caches. Models that take turns drift together, and the ratio of
neighbouring runs is what can be trusted. On one thread the processor's time is what counts: on an
idle machine it is the time that passes, on a busy one it leaves out when others had the processor.
Where its clock has stood still, as it may on a virtual machine, the time that passed is taken.
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
    """Times of one model, in milliseconds per run.

    Attributes:
        median_ms: the median.
        p10_ms: the tenth percentile.
        p90_ms: the ninetieth percentile.
        runs: how many were timed.
        speedup: the median ratio of the first model's time to this one's, run by run.
        speedup_p10: its tenth percentile.
        speedup_p90: its ninetieth percentile.

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
    """Time models in turns, A B A B ..., on random inputs of their own shapes.

    Args:
        models: ONNX files by name; speed-ups are over the first.
        batch: size of dynamic dimensions.
        threads: intra-operator threads of ONNX Runtime.
        seconds: how long to go on, warm-up aside.
        minimum: rounds that are run however long they take.

    """
    sessions = {name: open_session(path, threads) for name, path in models.items()}
    inputs = {name: random_inputs(session, batch) for name, session in sessions.items()}
    for name, session in sessions.items():  # warm-up: allocations and code paths
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
    """Open a model, a file or its bytes, as its latency is measured.

    Args:
        model: an ONNX file, or what one holds.
        threads: of one operator.
        profile_to: begin a profile, in a file whose name starts like this.

    Raises:
        InputError: there is no such file, or ONNX Runtime cannot load it.

    """
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise InputError(f"there is no file {model}; name an ONNX model")
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
            f"ONNX Runtime cannot load {what}: {str(error).splitlines()[0]}; is it a whole ONNX "
            "model?"
        ) from error


def random_inputs(session: onnxruntime.InferenceSession, batch: int) -> dict[str, Any]:
    """Make inputs of a session's shapes; dynamic sizes become ``batch``, numbers are seeded."""
    random = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for item in session.get_inputs():
        shape = [size if isinstance(size, int) else batch for size in item.shape]
        dtype = DTYPES.get(item.type)
        if dtype is None:
            raise InputError(f"input {item.name} is of type {item.type}, which cannot be made up")
        if np.issubdtype(dtype, np.floating):
            made[item.name] = random.standard_normal(shape).astype(dtype)
        else:
            made[item.name] = random.integers(0, 2, shape).astype(dtype)
    return made
