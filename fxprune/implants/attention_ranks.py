"""Low ranks of the products of attention: fewer positions per head, in a basis of their own.

Scores are ``q'k`` of every pair of tokens, and any ``A``, ``B`` with ``A B' = 1`` give the same
scores from ``A'q`` and ``B'k``. With the second moments ``Q`` of queries and ``K`` of keys of a
head, and ``Q = L L'``, ``K = M M'``, the best scores of rank r keep the leading singular directions
of ``L'M``, and miss by the sum of the other squares. Keys count less their mean, which adds the
same to all scores of a query. Values reach the output through the columns ``O`` of the layer behind
attention; with second moments ``Z = N N'`` of what attention makes of them, the best product of
rank r keeps the leading singular directions of ``O N``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.calibration.running import fixed_batch, placed
from fxprune.data.batches import batches
from fxprune.graph.node_args import arguments
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.implants.attention_sites import Attention, Projection
from fxprune.pipeline.context import Context

LEAST = 1e-12  # of the mean variance: what directions that never vary count as


@dataclass
class HeadMoments:
    """Sums over tokens: gram (heads, width, width), total (heads, width), and how many tokens."""

    gram: Tensor
    total: Tensor
    count: int

    @classmethod
    def of(cls, value: Tensor) -> HeadMoments:
        """Take the moments of (..., heads, tokens, width), in float64."""
        heads = value.double().flatten(0, -4).transpose(0, 1).flatten(1, 2)  # heads, tokens, width
        return cls(heads.transpose(1, 2) @ heads, heads.sum(1), heads.shape[1])

    def add(self, other: HeadMoments) -> None:
        """Count the tokens of another."""
        self.gram += other.gram
        self.total += other.total
        self.count += other.count

    @property
    def mean(self) -> Tensor:
        """The mean of each position."""
        return self.total / self.count

    def root(self, *, centred: bool) -> Tensor:
        """Return a lower triangle whose square the second moments are, with or without the mean."""
        second = self.gram / self.count
        if centred:
            second = second - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)
        level = second.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30) * LEAST
        eye = torch.eye(second.shape[1], dtype=second.dtype, device=second.device)
        found: Tensor = torch.linalg.cholesky(second + level.view(-1, 1, 1) * eye)
        return found


def measure_heads(
    program: Program, found: Sequence[Attention], context: Context, samples: int, batch_size: int
) -> dict[tuple[str, str], HeadMoments]:
    """Return the moments of queries, keys and values of attention, by the call's name and part."""
    data, size = context.samples.calibration, fixed_batch(program) or batch_size
    limit = max(min(samples, len(data)) // size * size, min(size, len(data)))
    stream = batches(data, size, seed=context.seed, limit=limit, device=context.device)
    program.eval()
    with placed(program, context.device), torch.no_grad():
        recorder = _Recorder(program, found)
        total = -(-limit // size)
        for batch in context.progress.track(stream, "measuring attention", total=total):
            recorder.run(*batch.inputs)
    return {key: _home(moments) for key, moments in recorder.found.items()}


def _home(moments: HeadMoments) -> HeadMoments:
    return HeadMoments(moments.gram.cpu(), moments.total.cpu(), moments.count)


class _Recorder(fx.Interpreter):
    def __init__(self, program: Program, found: Sequence[Attention]) -> None:
        super().__init__(program.graph_module)
        self.found: dict[tuple[str, str], HeadMoments] = {}
        self._calls = {attention.node for attention in found}

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if n in self._calls:
            given = arguments(n)
            for part in ("query", "key"):
                self._add(n.name, part, self.env[given[part]])
            self._add(n.name, "out", made)
        return made

    def _add(self, name: str, part: str, value: Tensor) -> None:
        moments = HeadMoments.of(value)
        if (name, part) in self.found:
            self.found[name, part].add(moments)
        else:
            self.found[name, part] = moments


@dataclass(frozen=True, eq=False)
class Basis:
    """A change of basis of a product, its best directions first.

    Attributes:
        first, second: heads x width x width: what multiplies each operand, a row per direction.
        squares: heads x width: what each direction contributes to the product's mean square.

    """

    first: Tensor
    second: Tensor
    squares: Tensor

    def unexplained(self, rank: int) -> float:
        """Return the share of the product's mean square beyond a rank, over all heads."""
        return float(self.squares[:, rank:].sum() / self.squares.sum().clamp_min(1e-300))


def score_basis(query: HeadMoments, key: HeadMoments) -> Basis:
    """Decompose scores: ``first`` is for queries, ``second`` for keys."""
    left, right = query.root(centred=False), key.root(centred=True)
    u, sizes, v = torch.linalg.svd(left.transpose(1, 2) @ right)
    scale = sizes.clamp_min(sizes[:, :1] * LEAST).sqrt().unsqueeze(2)
    return Basis(scale * _over(u.transpose(1, 2), left), scale * _over(v, right), sizes.square())


def value_basis(out: HeadMoments, columns: Tensor, *, centred: bool) -> Basis:
    """Decompose what a layer makes of the value of attention.

    Args:
        out: moments of the value.
        columns: heads x outputs x width, of the layer's weight.
        centred: whether a bias takes care of the mean.

    Returns:
        ``first`` is for values, ``second`` for the columns.

    """
    root = out.root(centred=centred)
    _, sizes, v = torch.linalg.svd(columns.double() @ root, full_matrices=False)
    return Basis(_over(v, root), v @ root.transpose(1, 2), sizes.square())


def _over(rows: Tensor, root: Tensor) -> Tensor:
    found: Tensor = torch.linalg.solve_triangular(root, rows, upper=False, left=False)
    return found


def change_outputs(program: Program, projection: Projection, basis: Tensor) -> None:
    """Let a layer make the positions of every head in another basis."""
    for name in filter(None, (projection.weight, projection.bias)):
        old = program.tensor(name).detach()
        made = torch.einsum("hrd,hd...->hr...", basis, old[projection.places].double())
        new = old.clone()
        new[projection.places] = made.to(old.dtype)
        set_tensor(program, name, new)


def change_inputs(program: Program, projection: Projection, basis: Tensor) -> None:
    """Let a layer read the positions of every head in another basis."""
    old = program.tensor(projection.weight).detach()
    made = torch.einsum("hrd,ohd->ohr", basis, old[:, projection.places].double())
    new = old.clone()
    new[:, projection.places] = made.to(old.dtype)
    set_tensor(program, projection.weight, new)


def shift_output(
    program: Program, projection: Projection, basis: Basis, mean: Tensor, rank: int
) -> None:
    """Add to a layer's bias what the directions beyond a rank contribute on average.

    The layer reads the new basis already.
    """
    if projection.bias is None:
        return
    left = torch.einsum("hrd,hd->hr", basis.first[:, rank:], mean)
    columns = program.tensor(projection.weight).detach().double()[:, projection.places[:, rank:]]
    bias = program.tensor(projection.bias).detach()
    more = torch.einsum("ohr,hr->o", columns, left)
    set_tensor(program, projection.bias, (bias.double() + more).to(bias.dtype))
