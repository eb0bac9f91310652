"""Compare the criteria of ``annotate-sensitivity`` on trained networks.

    python -m tools.rank_study resnet20 --folder DATA --out DIR     # resumable, piece by piece
    python -m tools.rank_study --out DIR --table                    # print the results

Per network: the measured rise in loss when one unit is removed (units drawn at random, each removed
alone), its rank correlation with every criterion, and the accuracy after removal at equal
multiply-accumulates, before recovery and after recalibrating batch norms, for several draws of the
calibration data. Every figure is a file in the output folder; existing files are not measured
again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

from fxprune import cost, find_groups
from fxprune.cli.allocator import keep_freed_memory
from fxprune.data.batches import batches
from fxprune.data.datasets import Samples
from fxprune.data.roles import Data, hold_out
from fxprune.graph.cost import activation_bytes
from fxprune.graph.facts import SENSITIVITY
from fxprune.graph.program import Program
from fxprune.passes import AnnotateSensitivity, PlanChannels, RecalibrateNorms, RemoveChannels
from fxprune.pipeline.context import Context
from fxprune.sensitivity.gates import GatedProgram
from fxprune.sensitivity.task import Criterion
from tools.study_models import (
    NETWORKS,
    Network,
    load_data,
    load_program,
    percent,
    study_options,
)

CRITERIA: tuple[Criterion, ...] = (
    "output-shift", "gauss-newton", "fisher", "taylor", "hessian-trace", "activation",
    "magnitude-l2", "magnitude-l1", "bn-scale", "random",
)  # fmt: skip
MOST_BYTES = 2**31  # of all values of a batch; fresh memory costs more than small batches do
FIXED = ("magnitude-l1", "magnitude-l2", "bn-scale")  # the same for every draw of the data


@dataclass(frozen=True, eq=False)
class Study:
    """One network under study.

    Attributes:
        network: what is studied.
        program: the dense program.
        calibration: images that the criteria may see.
        held_out: images that everything is measured on.
        out: folder of the results.

    """

    network: Network
    program: Program
    calibration: Samples
    held_out: Samples
    out: Path

    @classmethod
    def load(cls, name: str, folder: Path, out: Path) -> Study:
        """Read weights and images."""
        network = NETWORKS[name]
        images = load_data(folder / network.images, network.statistics)
        place = str(folder / network.arch) if ".py:" in network.arch else network.arch
        program = load_program(place, network.argument, folder / network.weights, images)
        (out / name).mkdir(parents=True, exist_ok=True)
        if network.held_out:
            unseen = load_data(folder / network.held_out, network.statistics)
            return cls(network, program, images, unseen, out / name)
        held_out, rest = hold_out(images, 0, 0.5)
        return cls(network, program, rest, held_out, out / name)

    def context(self, seed: int) -> Context:
        """Return the context of one draw of the calibration images."""
        return Context(data=Data(self.calibration), seed=seed, dense=self.program)

    def piece(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a stored result, or measure and store it."""
        path = self.out / f"{name}.json"
        if not path.exists():
            found = measure()
            aside = path.with_suffix(".part")
            aside.write_text(json.dumps(found))
            aside.rename(path)
            print(f"{self.out.name} {name}", flush=True)
        return json.loads(path.read_text())

    def truth(self) -> dict[str, Any]:
        """Measure the rise in loss with one unit removed, for units drawn at random."""
        groups = [group for group in find_groups(self.program) if group.frozen_because is None]
        gated = GatedProgram.of(self.program, groups)
        chosen = np.random.default_rng(0).permutation(gated.units)[: self.network.units]
        data = list(batches(self.held_out, 100, seed=7, limit=self.network.truth))

        def loss(gates: torch.Tensor) -> float:
            losses = [
                F.cross_entropy(gated.run(b.inputs, gates), cast(Any, b.target)) for b in data
            ]
            return float(torch.stack(losses).mean())

        with torch.no_grad():
            dense = loss(torch.ones(1, gated.units))
            rises = [loss(_closed(gated.units, int(unit))) - dense for unit in chosen]
        return {"units": chosen.tolist(), "rises": rises, "dense": dense}

    def scores(self, criterion: Criterion, seed: int) -> dict[str, Any]:
        """Score all units once."""
        program = self.program.copy()
        few = self.network.probes < 32
        step = AnnotateSensitivity(
            criterion, samples=self.network.samples, probes=self.network.probes,
            batch_size=32, min_probes=min(16, self.network.probes), output_probes=8 if few else 16,
        )  # fmt: skip
        step(program, self.context(seed))
        found = program.get(SENSITIVITY)
        return {name: part.tolist() for name, part in found.scores.items()}

    def accuracy(self, criterion: Criterion, seed: int, target: str) -> dict[str, float]:
        """Remove to a budget, then recalibrate; measure both."""
        program, context = self.program.copy(), self.context(seed)
        stored = self.piece(f"scores-{criterion}-{seed}", lambda: self.scores(criterion, seed))
        AnnotateSensitivity("random")(program, context)
        fact = program.get(SENSITIVITY)
        scores = {name: torch.tensor(part, dtype=torch.float64) for name, part in stored.items()}
        program.put(SENSITIVITY, type(fact)(criterion, scores))
        PlanChannels(macs=target, round_to=4)(program, context)
        RemoveChannels()(program, context)
        cut = self.correct(program)
        RecalibrateNorms(samples=512)(program, context)
        left = cost(program).macs / cost(self.program).macs
        return {"cut": cut, "recalibrated": self.correct(program), "macs": left}

    def correct(self, program: Program) -> float:
        """Return the share of held-out images that are classified right."""
        right = total = 0
        size = min(max(MOST_BYTES // activation_bytes(program), 1), 100)
        with torch.no_grad():
            for batch in batches(self.held_out, size, seed=3, limit=self.network.evaluated):
                right += int((program(*batch.inputs).argmax(1) == batch.target).sum())
                total += len(batch)
        return right / total

    def run(self, seeds: int, criteria: tuple[Criterion, ...]) -> None:
        """Measure every piece that is not there yet, cheap ones first."""
        self.piece("dense", lambda: self.correct(self.program))
        for seed in range(seeds):
            for criterion in criteria:
                if seed and criterion in FIXED:
                    continue
                for target in self.network.targets:
                    self.piece(
                        f"accuracy-{criterion}-{seed}-{target}",
                        lambda c=criterion, s=seed, t=target: self.accuracy(c, s, t),  # type: ignore[misc]
                    )
        self.piece("truth", self.truth)


def _closed(units: int, unit: int) -> torch.Tensor:
    gates = torch.ones(1, units)
    gates[0, unit] = 0
    return gates


def table(out: Path) -> Iterator[str]:
    """Yield the lines of a Markdown table per network."""
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        targets = NETWORKS[folder.name].targets
        dense = (folder / "dense.json").read_text() if (folder / "dense.json").exists() else "nan"
        heads = "".join(f" {t} MACs | recalibrated |" for t in targets)
        yield f"\n{folder.name}: dense {100 * float(dense):.1f} %\n"
        yield f"| criterion | rank correlation |{heads}"
        yield "|---" * (2 + 2 * len(targets)) + "|"
        for criterion in CRITERIA:
            cells = [_correlation(folder, criterion)]
            for target in targets:
                files = sorted(folder.glob(f"accuracy-{criterion}-*-{target}.json"))
                found = [json.loads(path.read_text()) for path in files]
                cells += [percent([f[key] for f in found]) for key in ("cut", "recalibrated")]
            yield f"| {criterion} | " + " | ".join(cells) + " |"


def _correlation(folder: Path, criterion: str) -> str:
    if not (folder / "truth.json").exists():
        return "-"
    truth = json.loads((folder / "truth.json").read_text())
    found = []
    for path in sorted(folder.glob(f"scores-{criterion}-*.json")):
        parts = json.loads(path.read_text())
        scores = np.concatenate([np.asarray(part) for part in parts.values()])
        if len(scores) > max(truth["units"]):
            found.append(spearmanr(scores[truth["units"]], truth["rises"]).statistic)
    return f"{np.mean(found):.2f}" if found else "-"


def main() -> None:
    """Run a study, or print its table."""
    keep_freed_memory()
    parser = study_options(__doc__)
    parser.add_argument("--criteria", nargs="*", default=CRITERIA, choices=CRITERIA)
    options = parser.parse_args()
    if options.network and options.folder:
        study = Study.load(options.network, options.folder, options.out)
        study.run(options.seeds, tuple(options.criteria))
    if options.table:
        print("\n".join(table(options.out)))


if __name__ == "__main__":
    main()
