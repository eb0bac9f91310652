"""Running a graph on identities: every value's dimensions are labelled with removable units.

Each index of each parameter dimension gets an identity, and the graph is interpreted on those
instead of on numbers. Operators that only move data are executed as they are; the others have a
rule (``fxprune.structure.rules.registry``); an operator with neither freezes what meets it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.facts import Slot
from fxprune.graph.program import Program
from fxprune.structure.choices import Choices, Survey
from fxprune.structure.describe import describe, fixed_size
from fxprune.structure.labels import Labels, Layer, Split, gather, rows, unlabelled
from fxprune.structure.merging import Merges, Reason

Rule = Callable[["Flow", fx.Node], Any]
Path = tuple[int | str, ...]


@dataclass(frozen=True)
class Read:
    """A place where a node sums over a dimension of an argument.

    Attributes:
        argument: which one: positions in ``node.args``, nested ones included.
        dim: the dimension that is summed away.

    """

    argument: Path
    dim: int


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
    rules: dict[Any, Rule]
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
        rule = self.rules.get(getattr(node.target, "overloadpacket", node.target))
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = self.rules["pointwise"]
        if rule is None:
            return self._unknown(node)
        try:
            return rule(self, node)
        except (RuntimeError, TypeError, ValueError, LookupError, StopIteration) as error:
            # A call that the rule does not foresee costs removable units only.
            return self._unknown(
                node, f"the rule of {node.target} does not cover this call: {error}"
            )

    def _parameter(self, node: fx.Node) -> Any:
        tensor = self.program.tensor(str(node.target))
        if not isinstance(tensor, Tensor):
            return None
        if (owner := self._owners.setdefault(id(tensor), node)) is not node:
            return self.values[owner]
        layers = tuple(
            Layer(dim, self.slot(Slot(str(node.target), dim), size))
            for dim, size in enumerate(tensor.shape)
            if size > 1
        )
        return Labels(tuple(tensor.shape), layers)

    def slot(self, slot: Slot, size: int) -> Tensor:
        """Hand out identities for a parameter dimension, or for a literal of a node."""
        self.slots[slot] = self.merges.fresh(size)
        return self.slots[slot]

    def literal(self, node: fx.Node, number: int, size: int) -> Tensor:
        """Hand out identities for positions that a node makes from a literal size."""
        return self.slot(Slot(f"node:{node.name}", number), size)

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
        why = why or "it meets positions that must stay"
        self.merges.merge(left, right, lambda: self.reason(node, why))

    def freeze(
        self, node: fx.Node, layers: Iterable[Layer], why: str, *, silent: bool = False
    ) -> None:
        """Never remove what these layers label."""
        reason = self.reason(node, why, silent=silent)
        for layer in layers:
            self.merges.freeze(layer.ids[layer.ids != 0], reason)

    def freeze_all(self, node: fx.Node, sources: Iterable[fx.Node], why: str) -> None:
        """Freeze every layer of every source."""
        for source in sources:
            found = self.values.get(source)
            for labels in found if isinstance(found, list) else [found]:
                if isinstance(labels, Labels):
                    self.freeze(node, labels.layers, why)

    def is_factor(self, layer: Layer) -> bool:
        """Whether a layer stands for one of several ways to see a split dimension."""
        return self.survey is not None and bool((layer.ids >= self.survey.virtual_from).any())

    def mix(self, node: fx.Node, layers: Iterable[Layer]) -> None:
        """Record that a node's statistics mix these identities."""
        self.mixes.extend((node.name, layer.ids) for layer in layers)

    def align(
        self, node: fx.Node, participants: list[tuple[Labels, int]], out_dim: int
    ) -> tuple[Layer, ...]:
        """Merge the layers of dimensions that must keep the same indices.

        Args:
            node: where they meet.
            participants: values and the dimension of each that takes part; sizes of one broadcast.
            out_dim: the dimension of the result.

        Returns:
            The layers of the result; none if some participant cannot shrink.

        """
        met = [
            (labels, dim, tuple(labels.at(dim)))
            for labels, dim in participants
            if labels.shape[dim] > 1
        ]
        labelled = [layers for *_, layers in met if layers]
        if not labelled:
            return ()
        if len(labelled) < len(met):
            labels, dim = next((labels, dim) for labels, dim, layers in met if not layers)
            why = fixed_size(node, labels, dim, self.values)
            for layers in labelled:
                self.freeze(node, layers, why)
            return ()
        first, *others = labelled
        for layers in others:
            for left, right in zip(first, layers, strict=False):
                self.merge(node, left.ids, right.ids)
        return tuple(Layer(out_dim, layer.ids) for layer in first)

    def settle(self, node: fx.Node, key: int, ids: Tensor) -> tuple[Layer, ...]:
        """Turn moved identities into layers, choosing one factor where a dimension was split."""
        found = gather(ids)
        if isinstance(found, Layer):
            return (found,)
        if isinstance(found, Tensor):
            self.freeze(node, [Layer(0, found.view(1))], "this index is picked out by its number")
            return ()
        if self.survey is not None:
            return self.survey.split(node, key, found)
        return (self._choose(node, key, found),)

    def sole(self, node: fx.Node, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        """Keep one layer of a dimension that several were merged into: positions have one owner."""
        if self.survey is not None:
            return layers
        kept: dict[int, Layer] = {}
        for layer in layers:
            if kept.setdefault(layer.dim, layer) is not layer:
                owner = "each of its positions also belongs to another unit"
                self.freeze(node, [layer], f"{owner}, of a dimension that is merged with it")
        return tuple(kept.values())

    def _choose(self, node: fx.Node, key: int, split: Split) -> Layer:
        """Keep one factor of a split removable: identities apart only in others are merged."""
        dim = self.choices.factor(node, key, split)
        matrix = rows(split, dim)
        first = matrix.amax(1)
        if matrix.shape[1] > 1:
            left = first.view(-1, 1).expand_as(matrix)
            real = matrix != 0
            self.merge(node, left[real], matrix[real])
        return Layer(dim, first)
