"""Running a graph on identities: every value's dimensions are labelled with removable units.

Each index of each parameter dimension gets an identity, and the graph is interpreted on those
instead of on numbers. Operators that only move data are executed as they are; the others have a
rule (``fxprune.structure.rules.registry``); an operator with neither freezes what meets it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.facts import Slot
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program
from fxprune.structure.choices import Choices, Survey
from fxprune.structure.describe import describe, fixed_size
from fxprune.structure.labels import DimLabels, Labels, SplitLabels, gather, rows, unlabelled
from fxprune.structure.merging import Merges, Reason
from fxprune.structure.reads import NotCovered, Read

aten = torch.ops.aten
Rule = Callable[["Flow", fx.Node], Any]


@dataclass(frozen=True)
class Rules:
    """What to do with operators.

    Attributes:
        own: the rules of this package; a fault in one of them is raised.
        registered: those of users, which take precedence; where one fails, the call is frozen.
        pointwise: the rule of pointwise operators that have none of their own.

    """

    own: Mapping[Any, Rule]
    registered: Mapping[Any, Rule]
    pointwise: Rule


@dataclass(eq=False)
class Flow:
    """The labels of every value, and what was learnt on the way.

    Attributes:
        values: labels by node; a list of them for nodes with several outputs.
        slots: the parameter dimensions (and literals) that own identities, with their range.
        reads: by node, the dimensions it sums over.
        mixes: by node name, identities that a normalisation mixes with each other.

    """

    program: Program
    rules: Rules
    choices: Choices
    survey: Survey | None = None
    merges: Merges = field(default_factory=Merges)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    slots: dict[Slot, Tensor] = field(default_factory=dict)
    reads: dict[fx.Node, tuple[Read, ...]] = field(default_factory=dict)
    mixes: list[tuple[str, Tensor]] = field(default_factory=list)
    _owners: dict[int, fx.Node] = field(default_factory=dict)

    def run(self) -> Flow:
        """Label every value of the graph; returns the flow itself."""
        with torch.no_grad():
            for node in self.program.graph.nodes:
                self.values[node] = self._visit(node)
        return self

    def _visit(self, node: fx.Node) -> Any:
        match node.op:
            case "placeholder":
                return unlabelled(node.meta.get("val"))
            case "get_attr":
                return self._parameter(node)
            case "output":
                for source in node.all_input_nodes:
                    self.freeze_all(source, [source], "it is an output of the model")
                return None
        if node.target is operator.getitem:
            found, number = self.values[node.all_input_nodes[0]], node.args[1]
            if isinstance(found, list) and isinstance(number, int):
                return found[number]
            return unlabelled(node.meta["val"])
        return self._apply_rule(node)

    def _apply_rule(self, node: fx.Node) -> Any:
        packet = getattr(node.target, "overloadpacket", node.target)
        registered = self.rules.registered.get(packet)
        rule = registered or self.rules.own.get(packet)
        if rule is None and operator_of(node).pointwise:
            rule = self.rules.pointwise
        if rule is None:
            return self._unknown(node)
        try:
            return rule(self, node)
        except NotCovered as reason:
            return self._unknown(
                node, f"the rule of {node.target} does not cover this call: {reason}"
            )
        except Exception as error:
            if registered is None:
                error.add_note(f"in fxprune's rule for {describe(node)}; please report it")
                raise
            return self._unknown(node, f"the registered rule of {node.target} failed: {error}")

    def _parameter(self, node: fx.Node) -> Any:
        tensor = self.program.tensor(str(node.target))
        if not isinstance(tensor, Tensor):
            return None
        if (owner := self._owners.setdefault(id(tensor), node)) is not node:
            return self.values[owner]
        entries = tuple(
            DimLabels(dim, self.slot(Slot(str(node.target), dim), size))
            for dim, size in enumerate(tensor.shape)
            if size > 1
        )
        return Labels(tuple(tensor.shape), entries)

    def slot(self, slot: Slot, size: int) -> Tensor:
        """Hand out identities for a parameter dimension, or for a literal of a node."""
        self.slots[slot] = self.merges.fresh(size)
        return self.slots[slot]

    def literal(self, node: fx.Node, number: int, size: int) -> Tensor:
        """Hand out identities for positions that a node makes from a literal size."""
        return self.slot(Slot(f"node:{node.name}", number), size)

    def sized(self, node: fx.Node, dim: int, size: Any, value: int) -> tuple[DimLabels, ...]:
        """Label a dimension that a node makes from a size, so that it may shrink with the size.

        Args:
            node: what makes it.
            dim: the dimension.
            size: a number, or a node that computes one: the size of a labelled dimension shrinks
                with it, a multiple of the batch may lose whole factors, others must stay.
            value: the size at the example inputs.

        """
        if value < 2:
            return ()
        if not isinstance(size, fx.Node):
            return (DimLabels(dim, self.literal(node, dim, value)),)
        if size.target is aten.sym_size.int:
            source, number = size.args
            return tuple(DimLabels(dim, entry.ids) for entry in self.labels(source).at(number))  # type: ignore[arg-type]
        factor = self._factor(size)
        if factor < 2:
            return ()
        return (DimLabels(dim, self.literal(node, dim, factor).repeat(value // factor)),)

    def _factor(self, size: Any) -> int:
        """The number that a size is a multiple of, the other factors being sizes that must stay."""
        if isinstance(size, int):
            return size
        if not isinstance(size, fx.Node):
            return 1
        if size.target is operator.mul:
            return math.prod(map(self._factor, size.args))
        return 1

    def _unknown(self, node: fx.Node, why: str = "") -> Any:
        if (outputs := unlabelled(node.meta.get("val"))) is None:
            return None  # a size, not a tensor
        why = why or f"no rule is known for operator {node.target}"
        advice = "; register one with fxprune.operator_rule if its dimensions may shrink"
        self.freeze_all(node, node.all_input_nodes, why + advice)
        return outputs

    # What rules call.

    def labels(self, value: Any) -> Labels:
        """Return the labels of an argument; anything but a tensor has none."""
        if isinstance(value, fx.Node):
            found = self.values.get(value)
            if isinstance(found, Labels):
                return found
        return Labels(())

    def concrete(self, value: Any) -> Any:
        """Return a size or other scalar argument as it is at the example inputs."""
        if isinstance(value, fx.Node):
            return value.meta["val"]
        if isinstance(value, (list, tuple)):
            return [self.concrete(item) for item in value]
        return value

    def reason(self, node: fx.Node, why: str, *, silent: bool = False) -> Reason:
        """Explain a freeze: operator, node, module path, source line, and why."""
        return Reason(node.name, f"{why} ({describe(node)})", silent)

    def merge(self, node: fx.Node, left: Tensor, right: Tensor, why: str = "") -> None:
        """Let identities that meet at a node live or die together."""
        if self.survey is not None and not self.survey.same_kind(left, right):
            return
        why = why or "it is joined with positions that must stay"
        self.merges.merge(left, right, lambda: self.reason(node, why))

    def freeze(
        self, node: fx.Node, entries: Iterable[DimLabels], why: str, *, silent: bool = False
    ) -> None:
        """Never remove what these entries label."""
        reason = self.reason(node, why, silent=silent)
        for entry in entries:
            self.merges.freeze(entry.ids[entry.ids != 0], reason)

    def freeze_all(self, node: fx.Node, sources: Iterable[fx.Node], why: str) -> None:
        """Freeze every entry of every source."""
        for source in sources:
            found = self.values.get(source)
            for labels in found if isinstance(found, list) else [found]:
                if isinstance(labels, Labels):
                    self.freeze(node, labels.entries, why)

    def is_factor(self, entry: DimLabels) -> bool:
        """Whether an entry stands for one of several ways to see a split dimension."""
        return self.survey is not None and bool((entry.ids >= self.survey.virtual_from).any())

    def mix(self, node: fx.Node, entries: Iterable[DimLabels]) -> None:
        """Record that a node's statistics mix these identities."""
        self.mixes.extend((node.name, entry.ids) for entry in entries)

    def align(
        self, node: fx.Node, participants: list[tuple[Labels, int]], out_dim: int
    ) -> tuple[DimLabels, ...]:
        """Merge the entries of dimensions that must keep the same indices.

        Args:
            node: where they meet.
            participants: values and the dimension of each that takes part; sizes of one broadcast.
            out_dim: the dimension of the result.

        Returns:
            The entries of the result; none if some participant cannot shrink.

        """
        met = [
            (labels, dim, tuple(labels.at(dim)))
            for labels, dim in participants
            if labels.shape[dim] > 1
        ]
        labelled = [entries for *_, entries in met if entries]
        if not labelled:
            return ()
        if len(labelled) < len(met):
            labels, dim = next((labels, dim) for labels, dim, entries in met if not entries)
            why = fixed_size(node, labels, dim, self.values)
            for entries in labelled:
                self.freeze(node, entries, why)
            return ()
        first, *others = labelled
        for entries in others:
            for left, right in zip(first, entries, strict=False):
                self.merge(node, left.ids, right.ids)
        return tuple(DimLabels(out_dim, entry.ids) for entry in first)

    def settle(self, node: fx.Node, key: int, ids: Tensor) -> tuple[DimLabels, ...]:
        """Turn moved identities into entries, choosing one factor where a dimension was split."""
        found = gather(ids)
        if isinstance(found, DimLabels):
            return (found,)
        if isinstance(found, Tensor):
            self.freeze(
                node, [DimLabels(0, found.view(1))], "this index is selected by a constant number"
            )
            return ()
        if self.survey is not None:
            return self.survey.split(node, key, found)
        return (self._choose(node, key, found),)

    def sole(self, node: fx.Node, entries: tuple[DimLabels, ...]) -> tuple[DimLabels, ...]:
        """Keep one entry of a dimension that several were merged into: positions have one owner."""
        kept: dict[int, DimLabels] = {}
        factors = []
        for entry in entries:
            if self.is_factor(entry):
                factors.append(entry)
            elif kept.setdefault(entry.dim, entry) is not entry:
                owner = "each of its positions also belongs to another unit"
                self.freeze(node, [entry], f"{owner}, in a dimension that is merged with it")
        return (*kept.values(), *factors)

    def _choose(self, node: fx.Node, key: int, split: SplitLabels) -> DimLabels:
        """Keep one factor of a split removable: identities apart only in others are merged."""
        dim = self.choices.factor(node, key, split)
        matrix = rows(split, dim)
        first = matrix.amax(1)
        if matrix.shape[1] > 1:
            left = first.view(-1, 1).expand_as(matrix)
            real = matrix != 0
            self.merge(node, left[real], matrix[real])
        return DimLabels(dim, first)
