"""Compose a pipeline by hand: halve the MACs and parameters of the digits network.

Run ``python -m examples.compose`` in the checkout; it takes about a minute on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

import fxprune
from examples.digits.model import digits_net
from fxprune import passes

CHECKPOINT = Path(__file__).parent / "digits" / "digits.safetensors"


def pipeline(keep: str = "50%", epochs: int = 8) -> fxprune.Pipeline:
    """Compose the passes; their order is checked here, before anything runs."""
    return fxprune.Pipeline(
        [
            passes.AnnotateSensitivity(probes=64, samples=256),
            passes.PlanChannels(macs=keep, params=keep),
            passes.RemoveChannels(),
            passes.RecalibrateNorms(),
            passes.Finetune(epochs=epochs),
            passes.FoldBatchNorm(),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/compose"))
    options = parser.parse_args()

    model = fxprune.load_model(CHECKPOINT, f"{digits_net.__module__}:digits_net")
    data = fxprune.load_data("digits")
    assert isinstance(model, nn.Module)
    example = next(fxprune.batches(data.calibration, 2)).inputs

    program = fxprune.trace(model, example)
    dense = program.copy()
    for group in fxprune.find_groups(program):
        state = group.frozen_because or "removable"
        print(f"{len(group.units):4d} units in {len(group.slots):2d} slots, {state}: {group.name}")

    steps = pipeline()
    print(steps)
    print(steps.run(program, fxprune.Context(data=data, device="cpu", seed=0)))

    for name, candidate in (("before", dense), ("after", program)):
        cost = fxprune.cost(candidate)
        found = fxprune.evaluate(candidate, data)
        print(f"{name}: {found.accuracy:.2%}, {cost.params:,} parameters, {cost.macs:,} MACs")

    options.out.mkdir(parents=True, exist_ok=True)
    fxprune.export_onnx(program, options.out / "model.onnx")
    fxprune.save(program, options.out / "model.pt2")


if __name__ == "__main__":
    main()
