"""Check random networks: program against model, and zero-then-remove.

Usage: ``python -m tools.random_networks [COUNT] [SEED]``, from the project's root. Prints every
network that fails, with its design, and exits with the number of failures.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch

import fxprune
from fxprune.errors import FxpruneError
from fxprune.graph.capture_check import check_capture
from fxprune.structure.verify import sample_units

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from blocks import Step
from strategies import HEADS, KINDS, Design, Network

LIMIT = 1e-10  # relative, in double precision


def draw(generator: random.Random) -> Design:
    """Draw the design of a network of two to seven steps."""
    steps = tuple(
        Step(
            generator.choice(KINDS),
            generator.randint(0, 2),
            generator.randint(0, 3),
            generator.choice((4, 8, 12)),
        )
        for _ in range(generator.randint(2, 7))
    )
    return Design(steps, generator.choice(HEADS), generator.randint(0, 3))


def fault_of(design: Design) -> str | None:
    """Return what is wrong with the program of a network; None if nothing is."""
    network = Network(design)
    x = (network.example(2),)
    try:
        program = fxprune.trace(network, x)
        check_capture(network, program, [(network.example(3),)], training=True)
        units = sample_units(fxprune.find_groups(program), 0.5)
        exact = {group: chosen for group, chosen in units.items() if not group.mixed_by}
        error = fxprune.verify_removal(program, exact).error if exact else 0.0
    except FxpruneError as problem:
        return f"{type(problem).__name__}: {problem}"
    if error is None or not error <= LIMIT:
        return f"zero-then-remove differs by {error}"
    return None


def main(count: int = 2000, seed: int = 0) -> int:
    """Check so many networks; return how many fail."""
    generator, failures = random.Random(seed), 0
    for _ in range(count):
        design = draw(generator)
        if (fault := fault_of(design)) is not None:
            failures += 1
            print(f"{design}: {fault}", flush=True)
        torch._dynamo.reset()
    print(f"{failures} of {count} networks fail (seed {seed})")
    return failures


if __name__ == "__main__":
    sys.exit(min(main(*map(int, sys.argv[1:3])), 250))
