"""What a node of a captured graph calls, and with which arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx


def packet_of(node: fx.Node) -> Any:
    """Return the operator that a node calls, whichever overload; None if it calls none."""
    return getattr(node.target, "overloadpacket", None)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return a call's arguments by the names in its operator's schema, defaults filled in.

    What has neither a value nor a default is None.
    """
    formal = node.target._schema.arguments  # type: ignore[union-attr]
    bound = {item.name: item.default_value if item.has_default_value() else None for item in formal}
    return {**bound, **dict(zip(bound, node.args, strict=False)), **node.kwargs}


def argument(node: fx.Node, name: str) -> Any:
    """Return one argument of a call by its name in the schema, or its default.

    Raises:
        KeyError: the operator has no such argument.

    """
    return arguments(node)[name]


def spread(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Return a number for each of some dimensions, where one number may stand for all.

    >>> spread([2], 2), spread(1, 3), spread((1, 2), 2)
    ((2, 2), (1, 1, 1), (1, 2))
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * dims if len(values) == 1 else values


def paddings(
    given: int | str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return a convolution's padding before and after each spatial dimension.

    >>> paddings("same", (4, 3), (1, 2)), paddings([1], (3, 3), (1, 1))
    (((1, 2), (2, 2)), ((1, 1), (1, 1)))
    """
    if given == "same":
        totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    sizes = 0 if isinstance(given, str) else given
    return tuple((size, size) for size in spread(sizes, len(kernel)))


def assign(node: fx.Node, name: str, value: Any) -> None:
    """Set an argument of a call by its name in the schema."""
    position = [item.name for item in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)
