"""Latency in ONNX Runtime, of several models in one interleaved run.

The speed of a machine drifts with its clock, its caches and its other processes. Models that run in
turns drift together, so the ratio of neighbouring runs is reliable. With one thread, processor time
is measured: on an idle machine it equals the elapsed time; on a busy one it excludes the time of
other processes. If the processor's clock has stood still, as it may on a virtual machine, elapsed
time is used.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from fxprune.errors import InputError

CPU = "CPUExecutionProvider"
Shapes = Mapping[str, tuple[int, ...]]  # of inputs, by name, the size of the batch included
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
        provider: the execution provider that ran it, which is not the one that was asked for where
            ONNX Runtime fell back.

    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    speedup: float
    speedup_p10: float
    speedup_p90: float
    provider: str = CPU


def compare(
    models: Mapping[str, str | Path],
    *,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 2.0,
    minimum: int = 20,
    provider: str = CPU,
    shapes: Shapes | None = None,
) -> dict[str, Latency]:
    """Time models in turns, A B A B ..., on random inputs of their input shapes.

    Args:
        models: ONNX files by name; speed-ups compare with the first.
        batch: size of dynamic dimensions.
        threads: intra-operator threads of ONNX Runtime.
        seconds: duration of the measurement, without warm-up.
        minimum: smallest number of rounds, whatever their duration.
        provider: the execution provider of ONNX Runtime.
        shapes: of inputs, by name; the others have the shapes of the file.

    Raises:
        InputError: a file, the provider or a shape cannot be used.

    """
    sessions = {
        name: open_session(path, threads, provider=provider) for name, path in models.items()
    }
    inputs = {name: random_inputs(one, batch, shapes) for name, one in sessions.items()}
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
            own = threads == 1 and provider == CPU and worked > 0
            times[name].append(1000 * (worked if own else passed))
        rounds += 1
    first = np.array(next(iter(times.values())))
    return {
        name: _summary(np.array(own), first, sessions[name].get_providers()[0])
        for name, own in times.items()
    }


def _summary(times: Any, first: Any, provider: str) -> Latency:
    low, median, high = np.percentile(times, [10, 50, 90])
    ratio_low, ratio, ratio_high = np.percentile(first / times, [10, 50, 90])
    return Latency(
        float(median), float(low), float(high), len(times), float(ratio), float(ratio_low),
        float(ratio_high), provider,
    )  # fmt: skip


def fallback_note(found: Mapping[str, Latency], provider: str) -> str | None:
    """Return a note on the models that another provider ran than the one asked for, if any."""
    others = {one.provider for one in found.values()} - {provider}
    if not others:
        return None
    return (
        f"ONNX Runtime fell back from {provider} to {', '.join(sorted(others))}: the latencies are "
        "those of the latter; check that the provider's libraries and its device are installed"
    )


def check_provider(name: str) -> None:
    """Check that this ONNX Runtime has an execution provider.

    Raises:
        InputError: it does not; the message lists those that it has.

    """
    available = onnxruntime.get_available_providers()
    if name not in available:
        raise InputError(
            f"the execution provider '{name}' is not part of this ONNX Runtime; it has "
            f"{', '.join(available)}"
        )


def parse_shapes(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Read ``name=1x26`` texts: the shapes of inputs, the size of the batch first.

    Raises:
        InputError: a text cannot be read.

    """
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, sizes = text.partition("=")
        parts = re.split("[x,]", sizes)
        if not name or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise InputError(
                f"latency-shape {text}: write name=SIZExSIZE, for example input_ids=1x26"
            )
        found[name] = tuple(map(int, parts))
    return found


def open_session(
    model: bytes | str | Path,
    threads: int,
    *,
    profile_to: Path | None = None,
    provider: str = CPU,
) -> onnxruntime.InferenceSession:
    """Open a model with the settings of a latency measurement.

    Args:
        model: an ONNX file, or its content.
        threads: intra-operator threads.
        profile_to: start a profile; the name of its file starts with this path.
        provider: the execution provider; what it cannot run is run on the CPU.

    Raises:
        InputError: there is no such file or provider, or ONNX Runtime cannot load the file.

    """
    check_provider(provider)
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
        return onnxruntime.InferenceSession(
            source, options, providers=list(dict.fromkeys([provider, CPU]))
        )
    except Exception as error:  # the runtime's errors have no common base
        what = "a model" if isinstance(model, bytes) else str(model)
        raise InputError(
            f"ONNX Runtime cannot load {what}: {str(error).splitlines()[0]}; check that it is a "
            "complete ONNX model"
        ) from error


def random_inputs(
    session: onnxruntime.InferenceSession, batch: int, shapes: Shapes | None = None
) -> dict[str, Any]:
    """Return seeded random inputs for a session.

    Args:
        session: whose inputs they are.
        batch: size of dynamic dimensions.
        shapes: of inputs, by name; the others have the shapes of the model.

    Raises:
        InputError: a shape does not suit the model, or an input has an unknown type.

    """
    random = np.random.default_rng(0)
    made: dict[str, Any] = {}
    given = dict(shapes or {})
    for item in session.get_inputs():
        wanted = given.pop(item.name, None)
        if wanted is not None:
            _check_shape(item, wanted)
        shape = wanted or [size if isinstance(size, int) else batch for size in item.shape]
        dtype = DTYPES.get(item.type)
        if dtype is None:
            raise InputError(
                f"input {item.name} has the type {item.type}, for which there are no random inputs"
            )
        if np.issubdtype(dtype, np.floating):
            made[item.name] = random.standard_normal(shape).astype(dtype)
        else:
            made[item.name] = random.integers(0, 2, shape).astype(dtype)
    if given:
        raise InputError(
            f"latency-shape names the input '{next(iter(given))}', which the model does not have; "
            f"it has {', '.join(made)}"
        )
    return made


def _check_shape(item: Any, wanted: tuple[int, ...]) -> None:
    fixed = [size if isinstance(size, int) else None for size in item.shape]
    if len(fixed) != len(wanted) or any(
        own not in (None, size) for own, size in zip(fixed, wanted, strict=True)
    ):
        given, own = ("x".join(map(str, shape)) for shape in (wanted, item.shape))
        raise InputError(
            f"latency-shape {item.name}={given} does not suit the model, whose input has the shape "
            f"{own}, where only names are free"
        )
