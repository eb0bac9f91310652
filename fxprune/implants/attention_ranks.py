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

import torch
from torch import Tensor

from fxprune.calibration.moments import RELATIVE_JITTER, Moments
from fxprune.calibration.stream import calibration_stream, record
from fxprune.graph.hooks import Call
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.implants.attention_sites import Attention, Projection
from fxprune.pipeline.context import Context


def measure_heads(
    program: Program, found: Sequence[Attention], context: Context, samples: int, batch_size: int
) -> dict[tuple[str, str], Moments]:
    """Return the moments of queries, keys and values of attention, by the call's name and part.

    Every head is a group, and every token a position.
    """
    moments: dict[tuple[str, str], Moments] = {}

    def add(name: str, part: str, value: Tensor) -> None:
        heads = value.double().flatten(0, -4).transpose(0, 1).flatten(1, 2).transpose(1, 2)
        if (name, part) not in moments:
            moments[name, part] = Moments.zeros(len(heads), heads.shape[1], 0, heads.device)
        moments[name, part].add(heads)  # heads x width x tokens

    def measure(call: Call) -> Tensor:
        made: Tensor = call.value()
        add(call.node.name, "query", call.args[0])
        add(call.node.name, "key", call.args[1])
        add(call.node.name, "out", made)
        return made

    stream = calibration_stream(program, context, samples, batch_size, remainder="drop")
    hooks = {attention.node: measure for attention in found}
    record(program, context, stream, hooks, "measuring attention")
    return {key: one.to("cpu") for key, one in moments.items()}


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


def score_basis(query: Moments, key: Moments) -> Basis:
    """Decompose scores: ``first`` is for queries, ``second`` for keys."""
    left, right = query.root(centred=False), key.root(centred=True)
    u, sizes, v = torch.linalg.svd(left.transpose(1, 2) @ right)
    scale = sizes.clamp_min(sizes[:, :1] * RELATIVE_JITTER).sqrt().unsqueeze(2)
    return Basis(scale * _over(u.transpose(1, 2), left), scale * _over(v, right), sizes.square())


def value_basis(out: Moments, columns: Tensor, *, centred: bool) -> Basis:
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
