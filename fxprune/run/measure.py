"""The figures of a run: accuracy over the evaluation data, files and latencies side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxprune.calibration.running import fixed_batch
from fxprune.data.roles import Data
from fxprune.graph.cost import cost
from fxprune.graph.program import Program
from fxprune.onnx.benchmark import Latency, compare
from fxprune.onnx.export import ExportCheck, export_onnx
from fxprune.pipeline.context import Context
from fxprune.pipeline.progress import Tracker
from fxprune.report.content import Measures
from fxprune.training.evaluate import Evaluation, evaluate, run_onnx, run_program


@dataclass(frozen=True)
class Judge:
    """Measures accuracy on the whole evaluation data.

    Attributes:
        data: None, or without evaluation data, leaves accuracy unknown.
        dense: whose predictions stand for labels where there are none.
        batch_size: samples per step.
        device: where PyTorch runs.
        threads: of ONNX Runtime; None leaves the number to it.
        progress: shows how far it is.

    """

    data: Data | None
    dense: Program
    batch_size: int = 128
    device: str = "cpu"
    threads: int | None = None
    progress: Tracker = field(default_factory=Tracker)

    def program(self, program: Program, text: str) -> Evaluation:
        """Judge a program in PyTorch; it is left on the device, in evaluation mode."""
        if self.data is None or self.data.eval is None:
            return Evaluation(None, 0, "accuracy was not measured: there is no evaluation data")
        return evaluate(
            run_program(program.to(self.device)),
            self.data.eval,
            batch_size=self.batch_size,
            reference=run_program(self.dense.to(self.device)),
            fixed_batch=fixed_batch(program),
            device=self.device,
            progress=self.progress,
            text=text,
        )

    def file(self, path: Path, text: str) -> Evaluation:
        """Judge an ONNX file in ONNX Runtime."""
        if self.data is None or self.data.eval is None:
            return Evaluation(None)
        return evaluate(
            run_onnx(path, threads=self.threads),
            self.data.eval,
            batch_size=self.batch_size,
            reference=run_program(self.dense.to("cpu")),
            fixed_batch=fixed_batch(self.dense),
            progress=self.progress,
            text=text,
        )


@dataclass(frozen=True)
class Emission:
    """A program written as ONNX.

    Attributes:
        path: the file, beside others if its weights are too large for one.
        export: what was written.
        latency: in turns with the others in one process; the speed-up is over the first.

    """

    path: Path
    export: ExportCheck
    latency: Latency

    @property
    def speedup(self) -> tuple[float, float, float]:
        """The tenth percentile, median and ninetieth percentile of the ratio of latencies."""
        return self.latency.speedup_p10, self.latency.speedup, self.latency.speedup_p90

    def move_to(self, folder: Path) -> None:
        """Move the file, and those beside it, into a folder."""
        for part in self.path.parent.iterdir():
            part.replace(folder / part.name)


@dataclass(frozen=True)
class Exported:
    """An ONNX file that was written and checked: its path, and what the check found."""

    path: Path
    check: ExportCheck


def export(
    program: Program,
    folder: Path,
    samples: Sequence[tuple[Any, ...]] = (),
    *,
    standard: bool = False,
) -> Exported:
    """Write a program to ``model.onnx`` in a folder of its own, and check it.

    Args:
        program: it is moved to the CPU.
        folder: made for this.
        samples: inputs to compare ONNX Runtime on, besides the example inputs.
        standard: use only operators of the ONNX standard.

    Raises:
        ExportError: the program cannot be written as ONNX or run in ONNX Runtime.
        PostconditionError: ONNX Runtime's outputs differ.

    """
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    check = export_onnx(program.to("cpu").eval(), path, samples=samples, standard=standard)
    return Exported(path, check)


def time_files(
    files: Mapping[str, Exported], context: Context, seconds: float = 2.0
) -> dict[str, Emission]:
    """Time files in turns, with the threads, provider and shapes of a context.

    Speed-ups are over the first.
    """
    paths = {name: one.path for name, one in files.items()}
    times = compare(
        paths, threads=context.threads, seconds=seconds, provider=context.provider,
        shapes=context.latency_shapes,
    )  # fmt: skip
    return {name: Emission(one.path, one.check, times[name]) for name, one in files.items()}


def measures(program: Program, emission: Emission | None, evaluation: Evaluation) -> Measures:
    """Put one model's figures together; without a file, size and latency are unknown."""
    static = cost(program)
    return Measures(
        static.params,
        static.macs,
        static.weight_bytes,
        None if emission is None else emission.export.onnx_bytes,
        None if emission is None else emission.latency.median_ms,
        evaluation.accuracy,
    )
