"""Masks: which weights are kept, by pattern or from a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fxprune.calibration.layer_matrix import Layer
from fxprune.errors import InputError
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program

BLOCK_PATTERN = re.compile(r"(\d+):(\d+)")


def blocks_of(pattern: str) -> tuple[int, int] | None:
    """Read ``N:M``, N kept of every M; None for other patterns.

    Raises:
        InputError: it keeps none or all.

    """
    if not (match := BLOCK_PATTERN.fullmatch(pattern)):
        return None
    kept, of = map(int, match.groups())
    if not 0 < kept < of:
        raise InputError(f"'{pattern}' keeps {kept} of every {of} weights; write for example 2:4")
    return kept, of


def input_axis(layer: Layer) -> int:
    """Return the dimension of a weight that counts inputs, those of one group if it has groups."""
    return 1 - (operator_of(layer.node).weight_outputs or 0)


def blocked(weight: Tensor, axis: int, kept: int, of: int) -> Tensor:
    """Return true for the largest weights of every block of consecutive inputs."""
    blocks = weight.detach().abs().movedim(axis, -1).unflatten(-1, (-1, of))
    chosen = blocks.topk(kept, dim=-1).indices
    keep = torch.zeros_like(blocks, dtype=torch.bool).scatter(-1, chosen, value=True)
    return keep.flatten(-2).movedim(-1, axis).contiguous()


def follows(keep: Tensor, axis: int, kept: int, of: int) -> bool:
    """Tell whether no block of consecutive inputs keeps more than it may."""
    if keep.shape[axis] % of:
        return False
    return bool((keep.movedim(axis, -1).unflatten(-1, (-1, of)).sum(-1) <= kept).all())


def smallest(weights: Mapping[str, Tensor], share: float, cap: float) -> dict[str, Tensor]:
    """Return masks without the smallest weights of all tensors, at most ``cap`` of each tensor.

    Raises:
        InputError: the cap does not leave room for the share.

    """
    total = sum(weight.numel() for weight in weights.values())
    count = round(share * total)
    candidates = []  # by tensor, the smallest weights, as many as the cap allows to remove
    for weight in weights.values():
        most = int(cap * weight.numel())
        candidates.append(weight.detach().abs().flatten().sort(stable=True).values[:most])
    if not weights:
        return {}
    pool = torch.cat(candidates)
    if count > len(pool):
        raise InputError(f"sparsity={share:g} cannot be reached with cap={cap:g}; raise the cap")
    owner = torch.arange(len(candidates)).repeat_interleave(
        torch.tensor([len(part) for part in candidates])
    )
    gone = owner[pool.sort(stable=True).indices[:count].cpu()].bincount(minlength=len(candidates))
    return {
        name: _without(weight, int(number))
        for (name, weight), number in zip(weights.items(), gone, strict=True)
    }


def _without(weight: Tensor, count: int) -> Tensor:
    """Return false for the ``count`` smallest weights of a tensor."""
    order = weight.detach().abs().flatten().sort(stable=True).indices
    keep = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    keep[order[:count]] = False
    return keep.view(weight.shape)


def uniform(weights: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return masks without the smallest weights of each tensor, the same share of each."""
    return {
        name: _without(weight, round(share * weight.numel())) for name, weight in weights.items()
    }


def read_masks(path: Path, program: Program) -> dict[str, Tensor]:
    """Read masks by parameter name; weights at zero or false are removed.

    Raises:
        InputError: the file cannot be read, or does not fit the program.

    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error
    shapes = {str(node.target): program.tensor(str(node.target)).shape
              for node in program.tensor_nodes()}  # fmt: skip
    for name, mask in found.items():
        if name not in shapes:
            known = ", ".join(list(shapes)[:3])
            raise InputError(f"{path} masks '{name}', but the program has only {known}, ...")
        if mask.shape != shapes[name]:
            raise InputError(
                f"{path} masks '{name}' as {tuple(mask.shape)}, but it is {tuple(shapes[name])}"
            )
    return {name: mask != 0 for name, mask in found.items()}
