"""Plant one fault at a time in a copy of the checkout, and see that a test notices.

Usage: ``python -m tools.mutants [words of a mutant's name]``. Prints a line for each; the exit code
is the number of faults that no test noticed. A mutant is a piece of source and what it becomes; if
the piece is no longer there, exactly once, the mutant is out of date and that is said.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """A fault, and the tests that must notice it.

    Attributes:
        name: what goes wrong.
        file: where, from the checkout's root.
        old: a piece of source that occurs there once.
        new: what it becomes.
        tests: arguments of pytest.

    """

    name: str
    file: str
    old: str
    new: str
    tests: str


REMOVAL = "tests/test_removal.py tests/test_wiring.py"
MUTANTS = (
    Mutant(
        "merge: what meets an unlabelled position is not frozen",
        "fxprune/structure/merging.py",
        "none = (left == 0) != (right == 0)",
        "none = (left == 0) & (right == 0)",
        REMOVAL,
    ),
    Mutant(
        "convolution: groups need not keep the same width",
        "fxprune/rules/convolution.py",
        "    flow.merge(node, incoming[:1].expand_as(incoming), incoming)\n",
        "",
        REMOVAL,
    ),
    Mutant(
        "convolution: its input channels do not meet the weight's",
        "fxprune/rules/convolution.py",
        "flow.align(node, [(operand, channel), (weight, 1 - wide)], channel)",
        "flow.align(node, [(weight, 1 - wide)], channel)",
        REMOVAL,
    ),
    Mutant(
        "batch norm: the running variance stays whole",
        "fxprune/rules/normalisation.py",
        'names = ("weight", "bias", "running_mean", "running_var")',
        'names = ("weight", "bias", "running_mean")',
        REMOVAL,
    ),
    Mutant(
        "layer norm: it is not said to mix",
        "fxprune/rules/normalisation.py",
        "        aligned = flow.align(node, met, dim)\n        flow.mix(node, aligned)\n",
        "        aligned = flow.align(node, met, dim)\n",
        REMOVAL,
    ),
    Mutant(
        "softmax: the dimension that it shares out may shrink",
        "fxprune/rules/normalisation.py",
        '    flow.freeze(node, operand.at(dim), "a softmax shares one unit of mass along it")\n',
        "",
        REMOVAL,
    ),
    Mutant(
        "reshape: a position may belong to two units",
        "fxprune/rules/movement.py",
        "return Labels(shape, flow.sole(node, layers))",
        "return Labels(shape, flow.sole(node, ()) + layers)",
        "tests/test_attention.py",
    ),
    Mutant(
        "attention: grouped queries meet keys in the wrong order",
        "fxprune/rules/contraction.py",
        "layer.ids.repeat_interleave(times)",
        "layer.ids.repeat(times)",
        "tests/test_attention.py",
    ),
    Mutant(
        "attention: the scale follows the head's width",
        "fxprune/structure/repair.py",
        'node.update_kwarg("scale", 1.0 / math.sqrt(width))',
        'node.update_kwarg("scale", None)',
        "tests/test_attention.py",
    ),
    Mutant(
        "pad: what is cut from the front is counted at the back",
        "fxprune/structure/repair.py",
        "amounts[position] = int(mask[:before].sum())",
        "amounts[position] = int(mask[mask.numel() - before :].sum())",
        REMOVAL,
    ),
    Mutant(
        "pad: the shortcut's zero channels stay",
        "fxprune/structure/repair.py",
        "amounts[position + 1] = int(mask[mask.numel() - after :].sum())",
        "amounts[position + 1] = after",
        REMOVAL,
    ),
    Mutant(
        "group norm: the number of groups stays",
        "fxprune/structure/repair.py",
        "node.update_arg(1, int(mask.view(groups, -1).any(1).sum()))",
        "node.update_arg(1, groups)",
        REMOVAL,
    ),
    Mutant(
        "split: every piece loses what the first one loses",
        "fxprune/structure/repair.py",
        "remains.size(dim, piece) for piece",
        "remains.size(dim, 0) for piece",
        REMOVAL,
    ),
    Mutant(
        "removal: a tied weight is sliced under each of its names",
        "fxprune/structure/removal.py",
        "if id(tensor) not in sliced:",
        "if True:",
        REMOVAL,
    ),
    Mutant(
        "removal: what is left forgets earlier cuts",
        "fxprune/structure/removal.py",
        "indices[node.name][dim] = before[mask]",
        "indices[node.name][dim] = torch.arange(mask.numel())[mask]",
        REMOVAL,
    ),
    Mutant(
        "surgery: aliases of a replaced tensor keep the old one",
        "fxprune/graph/surgery.py",
        "            if tensor is old:\n                setattr(submodule, key, value)\n"
        "    for submodule in list(module.modules()):  # constants",
        "            if tensor is old and submodule is owner:\n"
        "                setattr(submodule, key, value)\n"
        "    for submodule in list(module.modules()):  # constants",
        "tests/test_surgery.py",
    ),
    Mutant(
        "cost: a convolution's groups are ignored",
        "fxprune/planning/macs.py",
        "return [(*every_dimension(positions), *every_dimension(weight)[1:])]",
        "return [(*every_dimension(positions), *every_dimension(node)[1:2])]",
        "tests/test_cost.py",
    ),
    Mutant(
        "least squares: the bias is fitted without the means",
        "fxprune/reconstruction/leastsquares.py",
        "used = moments.centred() if bias else moments",
        "used = moments",
        "tests/test_leastsquares.py",
    ),
    Mutant(
        "least squares: the ridge is absolute",
        "fxprune/reconstruction/leastsquares.py",
        "(max(ridge, LEAST) * scale)",
        "(max(ridge, LEAST) * torch.ones_like(scale))",
        "tests/test_leastsquares.py",
    ),
    Mutant(
        "trace: evaluation mode is not restored",
        "fxprune/graph/trace.py",
        "            module.training = mode\n",
        "            module.training = False\n",
        "tests/test_trace.py",
    ),
    Mutant(
        "output: a run that fails leaves its files",
        "fxprune/run/output.py",
        "    finally:\n        shutil.rmtree(aside, ignore_errors=True)\n        drop_empty(made)",
        "    finally:\n        drop_empty(made)",
        "tests/test_output.py",
    ),
)


def survives(mutant: Mutant, checkout: Path) -> bool:
    """Plant a fault in a checkout, run its tests, and mend it again.

    Raises:
        LookupError: the piece of source is not there, or there more than once.

    """
    path = checkout / mutant.file
    sound = path.read_text(encoding="utf-8")
    if sound.count(mutant.old) != 1:
        raise LookupError(
            f"{mutant.file} holds the piece {sound.count(mutant.old)} times, not once"
        )
    path.write_text(sound.replace(mutant.old, mutant.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--hypothesis-profile=hasty"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*command, *mutant.tests.split()], cwd=checkout, env=environment, check=False,
            capture_output=True,
        )  # fmt: skip
    finally:
        path.write_text(sound, encoding="utf-8")
    if done.returncode not in (0, 1):  # neither passed nor failed: the tests did not run
        raise LookupError(done.stdout.decode()[-2000:])
    return done.returncode == 0


def main(words: list[str]) -> int:
    """Try the mutants whose names hold all of these words; returns how many survive."""
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.name for word in words)]
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in tracked:
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target, follow_symlinks=False)
        for mutant in chosen:
            start = time.monotonic()
            survived = survives(mutant, Path(folder))
            survivors += survived
            word = "SURVIVED" if survived else "killed"
            print(f"{word:8} {time.monotonic() - start:5.0f} s  {mutant.name}", flush=True)
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
