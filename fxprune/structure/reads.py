"""Where a node reads a dimension, and what a rule says of a call that it does not cover."""

from __future__ import annotations

from dataclasses import dataclass

Path = tuple[int | str, ...]


class NotCovered(Exception):  # noqa: N818  # an answer rather than a fault
    """Raised by a rule for a call that it does not cover; the message says what is special."""


@dataclass(frozen=True)
class Read:
    """A place where a node sums over a dimension of an argument.

    Attributes:
        argument: which one: positions in ``node.args``, nested ones included.
        dim: the dimension that is summed away.

    """

    argument: Path
    dim: int
