"""``python kit.zip``: measure on another machine what a plan for it needs, and judge models there.

Needs Python 3.10, NumPy and ONNX Runtime. ``times`` writes the file that ``fxprune compile
--latency-table`` reads; ``judge`` measures a model's latency and its accuracy on the samples of the
kit, because the same INT8 file can lose accuracy on other processors.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fxprune.errors import FxpruneError, InputError
from fxprune.files import write_text
from fxprune.latency.cache import FORMAT, Host
from fxprune.latency.sweeps import SWEEPS, measure_session, start, sweep
from fxprune.onnx.benchmark import CPU, Latency, compare, fallback_note, open_session
from fxprune.onnx.profile import profile

SECONDS = 2.0
RUNS = 30
DENSE = "dense/dense.onnx"


def times(kit: zipfile.ZipFile, host: Host, dense: Path) -> dict[str, Any]:
    """Measure all operators of a kit and its dense network; return what the table file holds."""
    sessions: Sequence[Sequence[str]] = json.loads(kit.read("kit.json"))["sessions"]
    first, *rest = [
        partial(_session, kit, number, keys, host) for number, keys in enumerate(sessions)
    ]
    anchors = start(first)
    found = anchors | sweep(_shown(rest * SWEEPS), anchors)
    whole = compare({"dense": dense}, threads=host.threads, seconds=SECONDS, provider=host.provider)
    _say(fallback_note(whole, host.provider))
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
        nodes = profile(dense, host.threads, RUNS, Path(scratch), provider=host.provider)
    operators: dict[str, float] = {}
    for node in nodes.values():
        operators[node.operator] = operators.get(node.operator, 0.0) + node.us
    return {
        "format": FORMAT,
        "host": asdict(host),
        "dense_ms": whole["dense"].median_ms,
        "operators": operators,
        "times": {key: [one.us, one.spread, one.when] for key, one in sorted(found.items())},
    }


def judge(kit: zipfile.ZipFile, host: Host, model: Path, dense: Path) -> dict[str, Any]:
    """Measure a model beside the dense one: latency, and accuracy where the kit has samples."""
    models = {"dense": dense, "model": model}
    found = compare(models, threads=host.threads, seconds=SECONDS, provider=host.provider)
    _say(fallback_note(found, host.provider))
    figures: dict[str, Any] = {"host": asdict(host)}
    for name, path in models.items():
        figures[name] = _latency(found[name])
        if "samples.npz" in kit.namelist():
            figures[name]["accuracy"] = accuracy(kit, path, host)
    manifest = json.loads(kit.read("kit.json"))
    return figures | {name: manifest[name] for name in ("samples", "labels", "dense_accuracy")}


def accuracy(kit: zipfile.ZipFile, model: Path, host: Host) -> float:
    """Return the share of the kit's samples that a model predicts right."""
    session = open_session(model, host.threads, provider=host.provider)
    outputs = [slot.name for slot in session.get_outputs()]
    logits = "logits" if "logits" in outputs else outputs[0]
    names = [slot.name for slot in session.get_inputs()]
    with np.load(io.BytesIO(kit.read("samples.npz"))) as stored:
        labels, inputs = stored["labels"], [stored[f"input{n}"] for n in range(len(names))]
    size = _batch(session.get_inputs()[0].shape)
    right = counted = 0
    for begin in range(0, len(labels), size):
        wanted = labels[begin : begin + size]
        places = np.minimum(np.arange(begin, begin + size), len(labels) - 1)
        feeds = {name: x[places] for name, x in zip(names, inputs, strict=True)}
        (scores,) = session.run([logits], feeds)
        predicted = _predicted(np.asarray(scores)[: len(wanted)], wanted)
        right += int((predicted == wanted)[wanted >= 0].sum())
        counted += int((wanted >= 0).sum())
    return right / counted


def _batch(shape: Sequence[int | str | None]) -> int:
    """Return the batch size that a model is fixed to, or one that suits any."""
    return shape[0] if shape and isinstance(shape[0], int) else 32


def _predicted(scores: Any, labels: Any) -> Any:
    """Return the predicted classes: along axis 1, or the last one for token logits."""
    if scores.size == labels.size:  # one logit per sample: two classes
        return (scores.reshape(labels.shape) > 0).astype(np.int64)
    without = [*scores.shape[:1], *scores.shape[2:]]
    return scores.argmax(1 if without == list(labels.shape) else -1)


def _latency(latency: Latency) -> dict[str, Any]:
    return asdict(latency)


def _session(
    kit: zipfile.ZipFile, number: int, keys: Sequence[str], host: Host
) -> Mapping[str, float]:
    return measure_session(kit.read(f"sessions/{number}.onnx"), keys, host)


def _shown(parts: Sequence[Any]) -> Iterator[Any]:
    """Yield parts, and show on a terminal how many are done."""
    for number, part in enumerate(parts, start=1):
        if sys.stderr.isatty():
            print(f"\rmeasuring session {number} of {len(parts)}", end="", file=sys.stderr)
        yield part
    if sys.stderr.isatty():
        print(file=sys.stderr)


def _say(note: str | None) -> None:
    if note is not None:
        print(note, file=sys.stderr)


def main(arguments: Iterable[str], path: Path) -> int:
    """Run the command line of the kit at a path; return the exit code."""
    parser = argparse.ArgumentParser(prog="python kit.zip", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("times", help="measure the operators; write a latency table")
    judging = commands.add_parser("judge", help="measure a model's latency and accuracy")
    judging.add_argument("model", type=Path, help="ONNX file")
    for command, name in ((measuring, "table.json"), (judging, "figures.json")):
        command.add_argument("-o", "--out", type=Path, default=Path(name), help="file to write")
        command.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
        command.add_argument("--provider", default=CPU, help="execution provider of ONNX Runtime")
    given = parser.parse_args(list(arguments))
    host = Host.here(given.threads, given.provider)
    try:
        with zipfile.ZipFile(path) as kit, tempfile.TemporaryDirectory() as folder:
            kit.extractall(folder, [one for one in kit.namelist() if one.startswith("dense/")])
            dense = Path(folder, DENSE)
            if given.command == "times":
                found = times(kit, host, dense)
            else:
                found = judge(kit, host, given.model, dense)
            _write(given.out, json.dumps(found, indent=0 if given.command == "times" else 2))
    except FxpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {given.out}")
    return 0


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another -o") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(sys.argv[0])))
