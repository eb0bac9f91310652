"""Compare heads that are narrowed in a fitted basis with plain removal of positions.

    python -m tools.attention_study --folder DATA --out DIR   # resumable, piece by piece
    python -m tools.attention_study --out DIR --table         # print the results

For a small vision transformer and shares of the heads' width: the accuracy after
``implant-attention`` and after removal of as many positions of every head, those with the smallest
weights, each before and after reconstruction; and the interleaved latency of the ONNX models.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fxprune import cost, find_groups, remove_units
from fxprune.data.batches import batches
from fxprune.data.roles import Data
from fxprune.graph.program import Program
from fxprune.models.compat import enable_torchvision
from fxprune.onnx.benchmark import compare
from fxprune.onnx.export import export_onnx
from fxprune.passes import ImplantAttention, Reconstruct
from fxprune.pipeline.context import Context
from fxprune.structure.groups import Group
from tools.study_models import load_data, load_program, percent

STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
RANKS: dict[str, float | None] = {"2% unexplained": None, "75%": 0.75, "50%": 0.5, "25%": 0.25}


class Study:
    """A vision transformer on CIFAR-10, and where its results lie."""

    def __init__(self, folder: Path, out: Path, images: int) -> None:
        enable_torchvision()
        train = load_data(folder / "cifar10_train_10k.npz", STATISTICS)
        self.test, self.images = load_data(folder / "cifar10_test.npz", STATISTICS), images
        place = f"{folder / 'arch' / 'build_timm.py'}:vit_cifar10_timm"
        self.program = load_program(place, None, folder / "vit_cifar10_timm.pt", train)
        self.context = Context(data=Data(train), dense=self.program)
        self.out = out

    def correct(self, program: Program) -> float:
        """Return the share of test images that are classified right."""
        right = 0
        with torch.no_grad():
            for batch in batches(self.test, 100, seed=3, limit=self.images):
                right += int((program(*batch.inputs).argmax(1) == batch.target).sum())
        return right / self.images

    def measure(self, program: Program) -> dict[str, float]:
        """Measure the accuracy before and after reconstruction."""
        left, found = cost(program).macs / cost(self.program).macs, self.correct(program)
        Reconstruct(samples=256, batch_size=32)(program, self.context)
        return {"macs": left, "cut": found, "reconstructed": self.correct(program)}

    def removed(self, rank: float) -> Program:
        """Remove the positions of heads that have the smallest weights."""
        program, doomed = self.program.copy(), {}
        for group in find_groups(program, prefer="head_dim"):
            if group.frozen_because is None and "qkv" in group.name:
                count = len(group.units) - round(rank * len(group.units))
                doomed[group] = _squares(program, group).argsort()[:count].tolist()
        remove_units(program, doomed)
        return program

    def pieces(self) -> Iterator[tuple[str, Any]]:
        """Yield what there is to measure."""
        yield "dense", lambda: {"macs": 1.0, "cut": self.correct(self.program)}
        for name, rank in RANKS.items():
            yield f"implant {name}", lambda r=rank: self.measure(self.narrowed(r))
            if rank is not None:
                yield f"removal {name}", lambda r=rank: self.measure(self.removed(r))
        yield "latency", self.latency

    def narrowed(self, rank: float | None) -> Program:
        """Put implants in."""
        program = self.program.copy()
        ImplantAttention(rank=rank)(program, self.context)
        return program

    def latency(self) -> dict[str, float]:
        """Time the dense model and those with implants against each other."""
        with tempfile.TemporaryDirectory() as folder:
            files: dict[str, str | Path] = {"dense": Path(folder) / "dense.onnx"}
            export_onnx(self.program, files["dense"])
            for number, (name, rank) in enumerate(RANKS.items()):
                files[f"implant {name}"] = Path(folder) / f"{number}.onnx"
                export_onnx(self.narrowed(rank), files[f"implant {name}"])
            return {name: times.median_ms for name, times in compare(files, seconds=4).items()}

    def run(self) -> None:
        """Measure every piece that is not there yet."""
        self.out.mkdir(parents=True, exist_ok=True)
        for name, measure in self.pieces():
            path = self.out / f"{name.replace(' ', '-')}.json"
            if not path.exists():
                path.write_text(json.dumps(measure()))
                print(name, flush=True)


def _squares(program: Program, group: Group) -> torch.Tensor:
    """By unit, the sum of its squared weights as outputs."""
    found = torch.zeros(len(group.units), dtype=torch.float64)
    for slot in group.slots:
        if slot.dim == 0 and slot.tensor.endswith("weight"):
            units, indices = (torch.from_numpy(part.copy()) for part in group.places(slot))
            weight = program.tensor(slot.tensor).detach().double()
            found.index_add_(0, units, weight.square().sum(1)[indices])
    return found


def table(out: Path) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    times = out / "latency.json"
    ms = json.loads(times.read_text()) if times.exists() else {}
    yield "| method and remaining width | remaining MACs | before recovery | reconstructed | ms |"
    yield "|---|---|---|---|---|"
    names = ["dense", *(f"{way} {name}" for name in RANKS for way in ("implant", "removal"))]
    for name in names:
        path = out / f"{name.replace(' ', '-')}.json"
        if path.exists():
            found = json.loads(path.read_text())
            cells = [
                percent([found[key]] if key in found else []) for key in ("cut", "reconstructed")
            ]
            time = f"{ms[name]:.2f}" if name in ms else "-"
            yield f"| {name} | {100 * found['macs']:.0f} % | {' | '.join(cells)} | {time} |"


def main() -> None:
    """Run the study, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="folder of weights and images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000, help="test images, at most 10,000")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.folder:
        Study(options.folder, options.out, options.images).run()
    if options.table:
        print("\n".join(table(options.out)))


if __name__ == "__main__":
    main()
