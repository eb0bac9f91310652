"""The physical cut: removing units slices every slot and repairs every literal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from fxprune.errors import InputError, PostconditionError
from fxprune.graph.facts import MASKS, REMOVED, Masks, Removed
from fxprune.graph.node_args import packet_of
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.structure.groups import Analysis, Group, analyse
from fxprune.structure.labels import Labels
from fxprune.structure.rules.record import Remaining, scaled
from fxprune.structure.rules.registry import known_repairs

Kept = dict[int, Tensor]  # by dimension, a bool mask over its indices
ToRemove = Mapping[Group, Sequence[int]]


def remove_units(program: Program, to_remove: ToRemove) -> int:
    """Remove units of a program, in place.

    Args:
        program: the program that the groups were found in, unchanged since.
        to_remove: for each group, the numbers of the units to remove.

    Returns:
        How many units were removed.

    Raises:
        InputError: a group is frozen, would lose every unit, or is not of this program.
        PostconditionError: a node does not come out as the analysis says; nothing was changed.

    """
    to_remove = {group: sorted(set(units)) for group, units in to_remove.items() if len(units)}
    for group, units in to_remove.items():
        _check(group, units)
    if not to_remove:
        return 0
    analysis, removed_mask = identify(program, to_remove)
    kept = {
        node: remaining_indices(analysis, value, removed_mask)
        for node, value in analysis.flow.values.items()
        if value is not None
    }
    _check_sizes(kept)
    cut(program, kept)
    _record(program, kept)
    _slice_masks(program, kept)
    return sum(len(units) for units in to_remove.values())


def _check(group: Group, units: Sequence[int]) -> None:
    total = len(group.units)
    if group.frozen_because is not None:
        raise InputError(f"group {group.name} is frozen: {group.frozen_because}")
    if units[0] < 0 or units[-1] >= total:
        raise InputError(f"group {group.name} has units 0 to {total - 1}, not {list(units)}")
    if len(units) == total:
        raise InputError(
            f"group {group.name} would lose all of its {total} units; keep at least one"
        )


def identify(program: Program, to_remove: ToRemove) -> tuple[Analysis, NDArray[np.bool_]]:
    """Analyse a program afresh and say which of its identities are to be removed.

    Raises:
        InputError: a group does not belong to the current program.

    """
    analysis = analyse(program, _preference(to_remove))
    found = {group.name: group for group in analysis.groups}
    removed_mask = np.zeros(len(analysis.component), dtype=bool)
    for group, units in to_remove.items():
        current = found.get(group.name)
        if current is None or len(current.units) != len(group.units):
            raise InputError(
                f"group {group.name} does not belong to the current program; find the groups again"
            )
        removed_mask |= np.isin(analysis.component, current.components[list(units)])
    return analysis, removed_mask


def _preference(to_remove: ToRemove) -> Any:
    return next(iter(to_remove)).preference


def remaining_indices(
    analysis: Analysis, value: Any, removed_mask: NDArray[np.bool_]
) -> list[Kept]:
    """For each tensor of a value, which indices of each dimension stay."""
    found = []
    for labels in value if isinstance(value, list) else [value]:
        kept: Kept = {}
        for entry in labels.entries if isinstance(labels, Labels) else ():
            ids = entry.ids.numpy()
            mask = torch.from_numpy(~removed_mask[ids] | (ids == 0))
            if not bool(mask.all()):
                kept[entry.dim] = kept[entry.dim] & mask if entry.dim in kept else mask
        found.append(kept)
    return found


def _check_sizes(kept: Mapping[fx.Node, list[Kept]]) -> None:
    for node, outputs in kept.items():
        for masks in outputs:
            for dim, mask in masks.items():
                if not bool(mask.any()):
                    raise InputError(
                        f"removal would leave nothing of dimension {dim} of node {node.name}; "
                        "keep at least one of the units that it holds"
                    )


def cut(program: Program, kept: Mapping[fx.Node, list[Kept]]) -> None:
    """Slice tensors and repair literals, then check every node's shape against the masks."""
    expected = {node: _expected(node, masks) for node, masks in kept.items()}
    shapes = {node: _shapes(node) for node in kept}
    sliced: set[int] = set()
    repairs = known_repairs()
    _restore_sizes(program, kept)
    for node in program.graph.nodes:
        if node not in kept or (not any(kept[node]) and not _reads_any(node, kept)):
            continue
        if node.op == "get_attr":
            tensor = program.tensor(str(node.target))
            if id(tensor) not in sliced:
                sliced.add(id(_slice_tensor(program, str(node.target), tensor, kept[node][0])))
            continue
        repair = repairs.get(packet_of(node))
        if repair is not None:
            repair(
                node, Remaining(shapes[node], kept[node], lambda arg: _masks(kept, arg), program)
            )
    program.refresh()
    for node, shape in expected.items():
        if _shapes(node) != shape:
            raise PostconditionError(
                f"after removal, node {node.name} ({node.target}) has shape {_shapes(node)} where "
                f"{shape} was expected; please report it with the model"
            )


def _restore_sizes(program: Program, kept: Mapping[fx.Node, list[Kept]]) -> None:
    """Let what is computed from the size of a cut dimension see the size that it had.

    So computed sizes are those of the dense program, until a repair scales them where it must.
    """
    for node in list(program.graph.nodes):
        if node.target is not torch.ops.aten.sym_size.int or not node.users:
            continue
        mask = _masks(kept, node.args[0]).get(int(node.args[1]) % _rank(node.args[0]))
        if mask is not None:
            users = list(node.users)
            new, old = int(mask.sum()), mask.numel()
            restored = scaled(program, node.next, node, old, new)
            restored.meta["val"] = old
            for user in users:
                user.replace_input_with(node, restored)


def _rank(node: Any) -> int:
    return int(node.meta["val"].dim())


def _reads_any(node: fx.Node, kept: Mapping[fx.Node, list[Kept]]) -> bool:
    return any(any(kept.get(source, ())) for source in node.all_input_nodes)


def _masks(kept: Mapping[fx.Node, list[Kept]], argument: Any) -> Kept:
    found = kept.get(argument, [{}]) if isinstance(argument, fx.Node) else [{}]
    return found[0] if found else {}


def _slice_tensor(program: Program, name: str, tensor: Tensor, masks: Kept) -> Tensor:
    value = tensor.detach()
    for dim, mask in masks.items():
        value = value.index_select(dim, mask.nonzero().squeeze(1).to(value.device))
    set_tensor(program, name, value)
    return program.tensor(name)


def _shapes(node: fx.Node) -> list[tuple[int, ...]]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [tuple(item.shape) if isinstance(item, Tensor) else () for item in values]


def _expected(node: fx.Node, masks: list[Kept]) -> list[tuple[int, ...]]:
    return [
        tuple(int(kept[dim].sum()) if dim in kept else size for dim, size in enumerate(shape))
        for shape, kept in zip(_shapes(node), masks, strict=True)
    ]


def _record(program: Program, kept: Mapping[fx.Node, list[Kept]]) -> None:
    """Remember which of the dense program's indices are left, composed over several removals."""
    earlier = program.facts.get(REMOVED.name)
    indices: dict[str, dict[int, Tensor]] = (
        {name: dict(dims) for name, dims in earlier.kept.items()} if earlier else {}
    )
    for node, outputs in kept.items():
        if len(outputs) != 1:
            continue  # a getitem node stands for each output of a node with several
        for dim, mask in outputs[0].items():
            before = indices.setdefault(node.name, {}).get(dim, torch.arange(mask.numel()))
            indices[node.name][dim] = before[mask]
    program.put(REMOVED, Removed(indices))


def _slice_masks(program: Program, kept: Mapping[fx.Node, list[Kept]]) -> None:
    """Let masks follow the tensors that they are about."""
    masks = program.facts.get(MASKS.name)
    if masks is None:
        return
    left = dict(masks.keep)
    dims = {str(node.target): found[0] for node, found in kept.items() if node.op == "get_attr"}
    for name in left.keys() & dims.keys():
        for dim, mask in dims[name].items():
            left[name] = left[name].index_select(dim, mask.nonzero().squeeze(1))
    program.put(MASKS, Masks(left, masks.pattern))
