"""A latency kit: one zip file that measures on another machine what a plan for it needs.

It holds the operators that the search may visit, the dense network, samples with labels, and the
modules that measure; on the machine it needs only NumPy and ONNX Runtime.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxprune.files import replacing
from fxprune.graph.cost import batch_of
from fxprune.graph.facts import Preference
from fxprune.graph.program import Program
from fxprune.latency.kit_main import DENSE
from fxprune.latency.layer_config import FORMS, LayerConfig, conversion
from fxprune.latency.stairs import step_configs
from fxprune.latency.table import ANCHOR_ENTRIES, key_of, sessions
from fxprune.latency.terms import latency_terms, operator_terms
from fxprune.latency.timed_model import Entry, model_of
from fxprune.onnx.export import export_onnx
from fxprune.structure.groups import find_groups

CARRIED = (
    "errors.py", "files.py", "host.py", "onnx/benchmark.py", "onnx/profile.py", "latency/cache.py",
    "latency/sweeps.py",
)  # fmt: skip
PACKAGES = ("", "onnx/", "latency/")
STEP = 1.2  # between the numbers of elements at which conversions are timed


@dataclass(frozen=True)
class KitSamples:
    """What a kit judges accuracy on.

    Attributes:
        inputs: of the model, each with the samples along its first dimension.
        labels: classes; negative ones are not counted.
        meaning: what the labels are.
        dense_accuracy: of the dense model on these samples, on the host that made the kit.

    """

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    meaning: str
    dense_accuracy: float | None


def write_kit(
    program: Program, path: Path, samples: KitSamples | None = None,
    attention: Preference = "heads",
) -> int:  # fmt: skip
    """Write the kit of a dense program; return the number of operators that it times.

    Args:
        program: the dense program.
        path: the zip file.
        samples: what ``judge`` measures accuracy on; None for latency alone.
        attention: remove whole heads, or narrow every head, in the plans that will be made.

    Raises:
        ExportError: the program cannot be written as ONNX.

    """
    program = program.copy(share=True).to("cpu").eval()
    entries = kit_entries(program, attention)
    parts = [list(ANCHOR_ENTRIES), *([*ANCHOR_ENTRIES, *part] for part in sessions(entries))]
    manifest: dict[str, Any] = {
        "sessions": [list(map(key_of, part)) for part in parts],
        "samples": 0 if samples is None else len(samples.labels),
        "labels": None if samples is None else samples.meaning,
        "dense_accuracy": None if samples is None else samples.dense_accuracy,
    }
    with replacing(path) as staging, zipfile.ZipFile(staging, "w", zipfile.ZIP_DEFLATED) as kit:
        kit.writestr("kit.json", json.dumps(manifest))
        _add_modules(kit)
        for number, part in enumerate(parts):
            kit.writestr(f"sessions/{number}.onnx", model_of(part))
        with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
            export_onnx(program, Path(folder, Path(DENSE).name), check=False)
            for file in sorted(Path(folder).iterdir()):
                kit.write(file, f"{Path(DENSE).parent}/{file.name}")
        if samples is not None:
            kit.writestr("samples.npz", _stored(samples))
    return len(entries)


def kit_entries(program: Program, attention: Preference = "heads") -> list[Entry]:
    """Return the operators of plans for a program: on grids of widths, in both forms."""
    groups = [one for one in find_groups(program, attention) if one.frozen_because is None]
    terms = [*latency_terms(program, groups), *operator_terms(program, groups)]
    configs = {config for term in terms for config in term.configs}
    configs |= {one for configs_ in step_configs() for one in configs_}
    configs |= set(_conversions(program))
    found = {(one, form) for one in configs for form in FORMS if form in one.forms}
    return sorted(found - set(ANCHOR_ENTRIES))


def _conversions(program: Program) -> Iterator[LayerConfig]:
    """Yield conversions between the forms, of one element up to the largest activation."""
    batch = batch_of(program)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op != "get_attr"]
    sizes = [one.numel() // batch for one in values if isinstance(one, torch.Tensor)]
    largest = max([*sizes, 1])
    steps = math.ceil(math.log(largest, STEP))
    for count in {min(math.ceil(STEP**n), largest) for n in range(steps + 1)}:
        yield conversion("quantize", count)
        yield conversion("dequantize", count)


def _add_modules(kit: zipfile.ZipFile) -> None:
    """Add what runs on the machine: a small ``fxprune`` that measures, and its command line."""
    root = Path(__file__).parent.parent
    for package in PACKAGES:
        kit.writestr(f"fxprune/{package}__init__.py", '"""What a latency kit needs."""\n')
    for module in CARRIED:
        kit.write(root / module, f"fxprune/{module}")
    kit.write(root / "latency" / "kit_main.py", "__main__.py")


def _stored(samples: KitSamples) -> bytes:
    arrays = {f"input{number}": x.numpy() for number, x in enumerate(samples.inputs)}
    stored = io.BytesIO()
    np.savez_compressed(stored, allow_pickle=False, labels=samples.labels.numpy(), **arrays)
    return stored.getvalue()
