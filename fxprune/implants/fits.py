"""Fitting implants: least squares from second moments, in closed form.

For rows ``W`` of a layer, features of covariance ``C`` and weights ``D`` of the outputs, an implant
that amounts to rows ``V`` leaves the error ``tr D (W - V) C (W - V)' D``; its bias makes the means
agree. A low-rank implant projects on the leading eigenvectors of ``D W C W' D``, so its error is
the sum of the others (Zhang et al. 2015). The other kinds fix what their first stage computes, and
solve for the last one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fxprune.calibration.moments import Moments
from fxprune.errors import InputError
from fxprune.implants.implant_types import Implant, Kind, Site, Stage

LEAST = 1e-12  # the smallest ridge, so that features that never vary do no harm
SWEEPS = 3  # between the stages of a depthwise implant


def fit(
    site: Site, weight: Tensor, bias: Tensor | None, moments: Moments, kind: Kind, *,
    scale: Tensor | None = None, ridge: float = 0.0,
) -> Implant:  # fmt: skip
    """Fit an implant of a kind to rows of a layer.

    Args:
        site: the layer.
        weight: the rows that it replaces, outputs x channels x taps, in any floating type.
        bias: their biases.
        moments: of what the layer reads.
        kind: what to fit.
        scale: how much each output's error weighs; None for equally.
        ridge: relative to the mean square of what the last stage reads.

    """
    rows, covariance = weight.detach().double().flatten(1), moments.covariance[0]
    scale = torch.ones(len(rows), device=rows.device) if scale is None else scale
    match kind.name:
        case "pointwise":
            found, stages = _pointwise(site, rows, covariance, ridge)
        case "depthwise":
            found, stages = _depthwise(site, rows, covariance, scale.double(), ridge)
        case "pair":
            found, stages = _pair(site, rows, covariance, scale.double(), kind.rank, ridge)
        case "low-rank":
            found, stages = _low_rank(site, rows, covariance, scale.double(), kind.rank)
    error = rows - found
    shift = error @ moments.mean[0]
    variance = ((rows @ covariance) * rows).sum(1)
    left = ((error @ covariance) * error).sum(1).clamp_min(0)
    whole = shift if bias is None else bias.detach().double() + shift
    stages = tuple(replace(stage, weight=stage.weight.to(weight.dtype)) for stage in stages)
    unexplained = (left / variance.clamp_min(1e-30)).clamp_max(1)
    return Implant(kind, stages, whole.to(weight.dtype), found, unexplained)


Fitted = tuple[Tensor, tuple[Stage, ...]]


def _solve(reads: Tensor, rows: Tensor, covariance: Tensor, ridge: float) -> Tensor:
    """Least squares of the rows on what a matrix makes of the features."""
    gram = reads @ covariance @ reads.T
    cross = reads @ covariance @ rows.T
    level = max(ridge, LEAST) * float(gram.diagonal().mean().clamp_min(1e-30))
    gram.diagonal().add_(level)
    solution: Tensor = torch.linalg.solve(gram, cross)
    return solution.T


def _unit(site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (1,) * len(site.kernel), (0,) * len(site.kernel)


def _pointwise(site: Site, rows: Tensor, covariance: Tensor, ridge: float) -> Fitted:
    if site.centre is None:
        raise InputError(
            f"the kernel of {site.node.name} has no centre tap for a 1 x 1 convolution"
        )
    one, _ = _unit(site)
    eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    reads = eye[site.centre :: site.taps]
    last = _solve(reads, rows, covariance, ridge)
    # The centre lies this far inside of what the padding adds; negative where it crops.
    inner = zip(site.padding, site.dilation, site.kernel, strict=True)
    padding = tuple(p - d * (size // 2) for p, d, size in inner)
    stage = Stage(last.reshape(*last.shape, *one), site.stride, padding, one)
    return last @ reads, (stage,)


def _depthwise(site: Site, rows: Tensor, covariance: Tensor, scale: Tensor, ridge: float) -> Fitted:
    channels, taps, (one, none) = site.channels, site.taps, _unit(site)
    blocks = rows.view(len(rows), channels, taps).transpose(0, 1) * scale.view(1, -1, 1)
    own = covariance.view(channels, taps, channels, taps).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    level = own.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30) * 1e-9
    eye = torch.eye(taps, dtype=rows.dtype, device=rows.device)
    factor = torch.linalg.cholesky(own + level.view(-1, 1, 1) * eye)
    left, *_ = torch.linalg.svd(blocks @ factor, full_matrices=False)
    kernels = (left[:, :, :1].transpose(1, 2) @ blocks).squeeze(1)  # channels, taps
    for sweep in range(SWEEPS):
        kernels = kernels / kernels.norm(dim=1, keepdim=True).clamp_min(1e-30)
        reads = torch.zeros(channels, channels, taps, dtype=rows.dtype, device=rows.device)
        reads.diagonal(dim1=0, dim2=1).copy_(kernels.T)
        reads = reads.flatten(1)
        last = _solve(reads, rows, covariance, ridge)
        if sweep + 1 < SWEEPS:
            kernels = _kernels(last * scale.view(-1, 1), rows * scale.view(-1, 1), covariance, taps)
    first = kernels.reshape(channels, 1, *site.kernel)
    stages = (
        Stage(first, site.stride, site.padding, site.dilation, channels),
        Stage(last.reshape(*last.shape, *one), one, none, one),
    )
    return last @ reads, stages


def _kernels(last: Tensor, rows: Tensor, covariance: Tensor, taps: int) -> Tensor:
    """The depthwise kernels that fit best for a given last stage."""
    mixing = (last.T @ last).repeat_interleave(taps, 0).repeat_interleave(taps, 1)
    gram = mixing * covariance
    gram.diagonal().add_(1e-9 * float(gram.diagonal().mean().clamp_min(1e-30)))
    wanted = (last.T @ rows @ covariance).view(last.shape[1], -1, taps)
    cross = wanted.diagonal(dim1=0, dim2=1).T.reshape(-1)
    solution: Tensor = torch.linalg.solve(gram, cross)
    return solution.view(-1, taps)


def _leading(rows: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """The orthonormal directions in which the outputs vary most, outputs x rank."""
    vectors: Tensor = torch.linalg.eigh(rows @ covariance @ rows.T)[1]
    return vectors[:, -rank:].flip(1)


def _low_rank(site: Site, rows: Tensor, covariance: Tensor, scale: Tensor, rank: int) -> Fitted:
    one, none = _unit(site)
    basis = _leading(rows * scale.view(-1, 1), covariance, rank)
    first, last = basis.T @ (rows * scale.view(-1, 1)), basis / scale.view(-1, 1)
    stages = (
        Stage(first.reshape(-1, site.channels, *site.kernel),
              site.stride, site.padding, site.dilation),
        Stage(last.reshape(*last.shape, *one), one, none, one),
    )  # fmt: skip
    return last @ first, stages


def _pair(
    site: Site, rows: Tensor, covariance: Tensor, scale: Tensor, rank: int, ridge: float
) -> Fitted:
    (high, wide), channels = site.kernel, site.channels
    tall = channels * high
    columns = covariance.view(tall, wide, tall, wide).diagonal(dim1=1, dim2=3).mean(-1)
    sliding = (rows * scale.view(-1, 1)).view(-1, tall, wide).movedim(2, 1).flatten(0, 1)
    first = _leading(sliding, columns, rank).T @ sliding  # rank, channels times high
    eye = torch.eye(wide, dtype=rows.dtype, device=rows.device)
    reads = torch.einsum("rt,wv->rwtv", first, eye).flatten(2).flatten(0, 1)
    last = _solve(reads, rows, covariance, ridge)
    stages = (
        Stage(first.reshape(-1, channels, high, 1), (site.stride[0], 1),
              (site.padding[0], 0), (site.dilation[0], 1)),
        Stage(last.reshape(-1, len(first), 1, wide), (1, site.stride[1]),
              (0, site.padding[1]), (1, site.dilation[1])),
    )  # fmt: skip
    return last @ reads, stages
