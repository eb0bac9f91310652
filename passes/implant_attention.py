"""Reduce the rank of the products inside attention, head by head, on calibration samples.

Before:
    qkv: 8x64x384 = linear(x, qkv_weight 384x128)         # 4 heads of 32
    attend: 8x4x64x32 = scaled_dot_product_attention(q, k, v)
    proj: 8x64x128 = linear(attend', proj_weight 128x128)

After (rank 16 for queries and keys, 24 for values):
    qkv: 8x64x224 = linear(x, qkv_weight' 224x128)
    attend: 8x4x64x24 = scaled_dot_product_attention(q', k', v', scale=32 ** -0.5)
    proj: 8x64x128 = linear(attend'', proj_weight' 128x96)

Scores depend on queries and keys only through the product of their weights; the output depends on
values only through the product of their weights with those of the next layer. First, both pairs of
weights are written in a basis that sorts the directions of each product by their contribution on
the samples; this does not change the function. Then the last positions of every head are removed.
The error is the sum of the discarded squares. Biases are part of the products, and the scale of
scores stays that of the original width.

A product is skipped if an operator other than data movement lies between attention and its linear
layers (such as rotary embeddings or norms of queries and keys), if heads share keys, if weights are
shared or computed, or if nothing is saved. Attention must be one call of
scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx

from fxprune.calibration.moments import Moments
from fxprune.errors import InputError
from fxprune.graph.facts import REMOVED
from fxprune.graph.program import Program
from fxprune.graph.surgery import insert_call, replace_node
from fxprune.implants.attention_cuts import Cut, Draft, Product, cuts_of
from fxprune.implants.attention_ranks import (
    Basis,
    change_inputs,
    change_outputs,
    measure_heads,
    score_basis,
    shift_output,
    value_basis,
)
from fxprune.implants.attention_sites import Attention, attentions, written_out
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass, Skip
from fxprune.structure.groups import find_groups
from fxprune.structure.removal import remove_units

WRITTEN_OUT = (
    "this attention is written out as products and a softmax; build the model so that it calls "
    "scaled_dot_product_attention (Hugging Face: attn_implementation='sdpa')"
)
HeadMoments = dict[tuple[str, str], Moments]


@dataclass(frozen=True)
class ImplantAttention(Pass):
    """Narrow attention heads, in the basis that keeps the most of their products.

    Attributes:
        rank: fraction of each head's width to keep; None keeps as little as ``unexplained`` allows.
        unexplained: fraction of a product's mean square that may be lost if ``rank`` is None.
        products: which products to reduce: queries and keys, values and the next layer, or both.
        round_to: ranks are multiples of this, or the full width.
        samples: largest number of calibration samples, drawn at random.
        batch_size: samples per batch.

    """

    rank: float | None = None
    unexplained: float = 0.02
    products: Literal["both", "query-key", "value"] = "both"
    round_to: int = 8
    samples: int = 256
    batch_size: int = 32

    name: ClassVar[str] = "implant-attention"
    keeps: ClassVar[Facts] = frozenset({REMOVED})
    repeats: ClassVar[str | None] = "a rank is a fraction of the width that a head has by then"

    def __post_init__(self) -> None:
        if self.rank is not None and not 0 < self.rank <= 1:
            raise InputError(f"rank is {self.rank}; it must lie between 0 and 1")
        if not 0 <= self.unexplained < 1 or self.round_to < 1:
            raise InputError("unexplained must lie between 0 and 1, and round-to be at least 1")

    def run(self, program: Program, context: Context) -> Outcome:
        """Change bases and cut; changes counts products."""
        found = attentions(program)
        skips = [Skip(node.name, WRITTEN_OUT) for node in written_out(program)]
        if not found:
            return Outcome(0, tuple(skips))
        moments = measure_heads(program, found, context, self.samples, self.batch_size)
        groups = find_groups(program, prefer="head_dim")
        cuts = list[Cut]()
        for attention in found:
            tried = [self._draft(program, attention, each, moments) for each in self._products]
            skips += [draft for draft in tried if isinstance(draft, Skip)]
            for cut in cuts_of([draft for draft in tried if isinstance(draft, Draft)], groups):
                (skips if isinstance(cut, Skip) else cuts).append(cut)  # type: ignore[arg-type]
        details = [dict(_details(draft, cut.rank)) for cut in cuts for draft in cut.drafts]
        for cut in cuts:
            for draft in cut.drafts:
                _change(program, draft, cut.rank, moments)
        remove_units(program, {cut.group: cut.units for cut in cuts})
        _rename(program, [draft for cut in cuts for draft in cut.drafts])
        return Outcome(len(details), tuple(skips), {"products": details})

    @property
    def _products(self) -> tuple[Product, ...]:
        return ("query-key", "value") if self.products == "both" else (self.products,)

    def _draft(
        self, program: Program, attention: Attention, product: Product, moments: HeadMoments
    ) -> Draft | Skip:
        """Find the basis of a product and its rank, or say why there is none."""
        scores, name = product == "query-key", attention.node.name
        one, two = (attention.query, attention.key) if scores else (attention.value, attention.out)
        if isinstance(one, str) or isinstance(two, str):
            return Skip(f"{name}, {product}", one if isinstance(one, str) else str(two))
        if scores:
            basis = score_basis(moments[name, "query"], moments[name, "key"])
        else:
            columns = program.tensor(two.weight).detach().cpu()[:, two.places].transpose(0, 1)
            basis = value_basis(moments[name, "out"], columns, centred=two.bias is not None)
        return Draft(product, attention, (one, two), basis, self._rank(basis))

    def _rank(self, basis: Basis) -> int:
        """The smallest rounded rank that is asked for."""
        width = int(basis.squares.shape[1])
        ranks = [*range(self.round_to, width, self.round_to), width]
        if self.rank is not None:
            wanted = self.rank * width
            enough = [rank for rank in ranks if rank >= wanted - 1e-9]
        else:
            enough = [rank for rank in ranks if basis.unexplained(rank) <= self.unexplained]
        return enough[0] if enough else width


def _change(program: Program, draft: Draft, rank: int, moments: HeadMoments) -> None:
    one, two = draft.parts
    change_outputs(program, one, draft.basis.first)
    if draft.product == "query-key":
        change_outputs(program, two, draft.basis.second)
        return
    change_inputs(program, two, draft.basis.second)
    mean = moments[draft.attention.node.name, "out"].mean
    shift_output(program, two, draft.basis, mean, rank)


def _rename(program: Program, drafts: list[Draft]) -> None:
    """Give nodes whose values have another basis other names, since no dense value is like them."""
    nodes: dict[fx.Node, None] = {}
    for draft in drafts:
        one, two = draft.parts
        other = two.call if draft.product == "query-key" else draft.attention.node
        nodes |= dict.fromkeys((one.call, other))
    for node in nodes:
        new = insert_call(program, node, node.target, node.args, dict(node.kwargs))  # type: ignore[arg-type]
        replace_node(program, node, new)
    if nodes:
        program.refresh()


def _details(draft: Draft, rank: int) -> Iterator[tuple[str, Any]]:
    yield "attention", draft.attention.node.name
    yield "product", draft.product
    yield "rank", rank
    yield "of", draft.basis.squares.shape[1]
    yield "unexplained", round(draft.basis.unexplained(rank), 6)
