"""A preconditioner for lookahead: the curvature if the layer's own output were the only one.

For outputs ``y = s * (W x) + b`` the curvature of ``|y|^2`` is, output by output, that of a least
squares problem: the second moments of ``x`` and of the constant, scaled by ``s``. The operations
after the layer weight positions and outputs differently, but the features make the problem
ill-conditioned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxprune.calibration.layer_matrix import Layer, blocks, output_shape, weight_rows
from fxprune.calibration.least_squares import MAX_FEATURES, factorise
from fxprune.calibration.moments import Moments
from fxprune.graph.node_args import argument
from fxprune.graph.program import Program
from fxprune.reconstruction.newton import Product, Vector
from fxprune.reconstruction.region import affine_tail, slope

RELATIVE_RIDGE = 1e-3  # relative to the mean square of the features
MAX_SYSTEM_ELEMENTS = 2**26  # of all systems together; beyond, only their diagonals are used


def preconditioner(
    program: Program, layer: Layer, names: tuple[str, ...], keep: Tensor | None, values: Any
) -> Product | None:
    """Return the product with an approximate inverse of the curvature.

    Args:
        program: the program that the layer is part of.
        layer: the layer.
        names: the variables: its weight, and its bias or that of its norm, if there is one.
        keep: which weights may change; None for all.
        values: the values before the layer, on one batch.

    Returns:
        None for layers with several calls, transposed convolutions, and too large systems.

    """
    if not layer.fits or len(layer.calls) > 1 or len(names) > 2:
        return None
    call, weight = layer.node, program.tensor(layer.weight).detach()
    rows = weight_rows(call, weight)
    if rows.shape[2] > MAX_FEATURES:
        return None
    gram = _gram(call, values[argument(call, "input")], rows, bias=len(names) > 1)
    scale = _scale(program, layer, rows, bias=len(names) > 1)
    kept = torch.ones_like(scale, dtype=torch.bool)
    if keep is not None:
        kept[..., : rows.shape[2]] = weight_rows(call, keep)
    solve = _solver(gram, kept)

    def multiply(vector: Vector) -> Vector:
        parts = [weight_rows(call, vector[0])]
        parts += [part.reshape(*rows.shape[:2], 1) for part in vector[1:]]
        found = (solve(torch.cat(parts, 2) / scale) / scale).to(weight.dtype)
        changed = found[..., : rows.shape[2]].reshape(weight.shape)
        return (changed, *(found[..., -1].reshape(part.shape) for part in vector[1:]))

    return multiply


def _gram(call: Any, value: Tensor, rows: Tensor, *, bias: bool) -> Tensor:
    """Second moments of the features, and of the constant: groups x f x f."""
    seen = Moments.zeros(rows.shape[0], rows.shape[2], 1, value.device)
    nothing = value.new_zeros(1).expand(output_shape(call, value))
    for features, _ in blocks(call, value, nothing):
        seen.add(features, features.new_zeros(features.shape[0], 1, features.shape[2]))
    gram = seen.gram / seen.count
    mean_square = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    if bias:
        mean = (seen.features / seen.count).unsqueeze(2)
        one = torch.ones_like(mean[:, :1])
        gram = torch.cat([torch.cat([gram, mean], 2), torch.cat([mean.mT, one], 2)], 1)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return gram + RELATIVE_RIDGE * mean_square.view(-1, 1, 1) * eye


def _scale(program: Program, layer: Layer, rows: Tensor, *, bias: bool) -> Tensor:
    """The factor of each variable in the output."""
    groups, outputs, features = rows.shape
    found = rows.new_ones(groups, outputs, features + bias, dtype=torch.float64)
    slopes = slope(program, affine_tail(layer.node)[:2])
    if slopes is not None:
        steep = torch.where(slopes.isinf(), 1.0, slopes).view(groups, outputs, 1)
        columns = features + (bias and layer.bias is not None)
        found[..., :columns] *= steep
    return found


def _solver(gram: Tensor, kept: Tensor) -> Any:
    """Return the function that solves with the kept part of the moments, for each output."""
    groups, outputs, size = kept.shape
    if bool(kept.all()):
        factor = factorise(gram)
        return lambda rows: torch.cholesky_solve(rows.mT, factor).mT
    if groups * outputs * size**2 > MAX_SYSTEM_ELEMENTS:
        diagonal = gram.diagonal(dim1=1, dim2=2).unsqueeze(1)
        return lambda rows: rows * kept / diagonal
    pairs = kept.unsqueeze(3) & kept.unsqueeze(2)
    systems = gram.float().unsqueeze(1) * pairs
    systems.diagonal(dim1=2, dim2=3).add_(~kept)
    factor = factorise(systems.flatten(0, 1)).view_as(systems)
    return lambda rows: torch.cholesky_solve((rows * kept).float().unsqueeze(3), factor)[..., 0]
