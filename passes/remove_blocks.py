"""Remove whole residual branches, with all their layers.

Before:
    relu: 8x16x32x32 = relu(batch_norm)
    conv2d_1: 8x16x32x32 = conv2d(relu, <layer1.0.conv1.weight 16x16x3x3>)
    relu_1: 8x16x32x32 = relu(conv2d_1)
    conv2d_2: 8x16x32x32 = conv2d(relu_1, <layer1.0.conv2.weight 16x16x3x3>)
    add: 8x16x32x32 = add(conv2d_2, relu)
    conv2d_3: 8x16x32x32 = conv2d(add, <layer1.1.conv1.weight 16x16x3x3>)

After:
    relu: 8x16x32x32 = relu(batch_norm)
    conv2d_3: 8x16x32x32 = conv2d(relu, <layer1.1.conv1.weight 16x16x3x3>)

A layer with few channels takes nearly as long as one with more, so a network of many narrow layers
gains more from fewer layers than from narrower ones. Branches of sums ``x + branch(x)`` are removed
one by one: each time the branch that moves the output least (in mean square, on calibration
samples) per multiply-accumulate saved, among those measured again after the last removal. No labels
are needed. A branch may be a block of a residual network, or the attention or the MLP of a
transformer layer. A branch stays if its values are read elsewhere or if its sum broadcasts. The
result must equal the program with the values of these branches set to zero; this is checked. Run
reconstruct afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxprune.calibration.outputs import logits_of
from fxprune.calibration.running import fixed_batch, placed
from fxprune.data.batches import batches
from fxprune.errors import PostconditionError
from fxprune.graph.cost import cost
from fxprune.graph.facts import MASKS, REMOVED
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass, ReportTable
from fxprune.pipeline.patterns import select_any
from fxprune.planning.blocks import Gone, Shift, remove_blocks
from fxprune.planning.budget import Target
from fxprune.structure.branches import Branch, find_branches, silence_error

MAX_RELATIVE_ERROR = 1e-5  # relative, single precision


@dataclass(frozen=True)
class RemoveBlocks(Pass):
    """Remove residual branches until a budget is met.

    Attributes:
        macs: largest number of multiply-accumulates per sample: a share of the dense model (75%),
            a factor (1.5x) or a number (30M).
        protect: name patterns of modules, weights or additions whose branches stay.
        samples: largest number of calibration samples that branches are judged on, drawn at random.
        batch_size: samples per batch.

    """

    macs: float | str = "75%"
    protect: tuple[str, ...] = ()
    samples: int = 256
    batch_size: int = 64

    name: ClassVar[str] = "remove-blocks"
    keeps: ClassVar[Facts] = frozenset({REMOVED, MASKS})

    def __post_init__(self) -> None:
        Target.of("macs", self.macs)

    def run(self, program: Program, context: Context) -> Outcome:
        """Remove; changes counts branches."""
        dense = context.dense or program
        limit = Target.of("macs", self.macs).limit(cost(dense).macs)
        protected = self._protected(program)
        if cost(program).macs <= limit:
            return Outcome()
        program.eval()
        before = program.copy(share=True)
        with placed(program, context.device), torch.no_grad():
            gone = tuple(self._removed(program, context, limit, protected))
        error = _checked(before, program, gone)
        told = [asdict(one) for one in gone]
        details = {"blocks": told, "zero_then_remove": error}
        return Outcome(len(gone), details=details, tables=(_table(gone),))

    def ensures(
        self, program: Program, context: Context, outcome: Outcome
    ) -> Iterator[tuple[str, bool]]:
        """The budget is met."""
        limit = Target.of("macs", self.macs).limit(cost(context.dense or program).macs)
        met = context.dense is None or cost(program).macs <= limit
        yield f"at most {limit:,.0f} multiply-accumulates remain", met

    def _protected(self, program: Program) -> frozenset[str]:
        names = {branch.add.name: _names(branch) for branch in find_branches(program)}
        return select_any(self.protect, names, "remove-blocks{protect}", "residual branch")

    def _removed(
        self, program: Program, context: Context, limit: float, protected: frozenset[str]
    ) -> Iterator[Gone]:
        shift = self._shift(program, context)
        whole = cost(program).macs

        def allows(branch: Branch) -> bool:
            return branch.add.name not in protected

        tracked = remove_blocks(program, limit, shift, allows)
        for one in context.progress.track(tracked, "removing residual branches"):
            left = f"{one.macs / whole:.0%} of the multiply-accumulates remain"
            context.progress.say(f"removed {one.title}: {left}")
            yield one

    def _shift(self, program: Program, context: Context) -> Shift:
        """How far outputs are from this program's, relative to their mean square."""
        data, fixed = context.samples.calibration, fixed_batch(program)
        size = fixed or self.batch_size
        total = min(self.samples, len(data))
        total = max(total - total % size, size) if fixed else total
        stream = batches(data, size, seed=context.seed, limit=total, device=context.device)
        seen = [(batch.inputs, logits_of(program(*batch.inputs))) for batch in stream]
        whole = sum(float(output.double().square().sum()) for _, output in seen)

        def shift(other: Program) -> float:
            moved = sum(_distance(logits_of(other(*inputs)), output) for inputs, output in seen)
            return moved / (whole or 1.0)

        return shift


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left.double() - right.double()).square().sum())


def _names(branch: Branch) -> tuple[str, ...]:
    return tuple(filter(None, (branch.module, branch.add.name, *branch.weights)))


def _checked(before: Program, after: Program, gone: tuple[Gone, ...]) -> float:
    """Return how far the result is from the program with its branches silenced, or fail."""
    names = {one.add for one in gone}
    branches = [branch for branch in find_branches(before) if branch.add.name in names]
    error = silence_error(before, branches, after)
    if not error <= MAX_RELATIVE_ERROR:
        raise PostconditionError(
            f"removing residual branches changed the output by {error:.1e}, relative to its size; "
            f"protect some of {', '.join(sorted(names)[:5])}, and please report this with the model"
        )
    return error


def _table(gone: tuple[Gone, ...]) -> ReportTable:
    """What went, for the report."""
    rows = [(one.title, f"{len(one.weights)}", f"{one.macs:,}", f"{one.shift:.3g}") for one in gone]
    columns = "branch", "tensors", "remaining MACs", "output change"
    return ReportTable("Residual branches removed, in order", columns, tuple(rows))
