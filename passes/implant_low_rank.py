"""Replace the outputs that the plan names by a cheaper operator, fitted to calibration samples.

Before (plan: units 1, 4, 7, 9 of 16 get an implant):
    conv2d: 8x16x32x32 = conv2d(x, weight 16x16x3x3)

After:
    kept: 8x12x32x32 = conv2d(x, kept_weight 12x16x3x3)
    implant: 8x4x32x32 = conv2d(x, implant0_weight 4x16x1x1, implant0_bias 4)
    conv2d: 8x16x32x32 = cat(kept, implant)

The units of the group are reordered so that the implanted ones come last in every tensor that they
occupy; this does not change the function. If the plan names a kind of implant for a layer but no
units, the implant replaces all its outputs and no concat is needed. The implant is fitted by least
squares to the outputs of the original layer (in HAP, Yu et al. 2022, it starts at zero). Grouped,
transposed and three-dimensional convolutions, layers with shared or computed weights, and layers
where nothing is saved are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from fxprune.calibration.moments import Moments
from fxprune.errors import InputError, PreconditionError
from fxprune.graph.facts import PLAN, REMOVED, Plan
from fxprune.graph.program import Program, shape_of
from fxprune.implants.fits import fit
from fxprune.implants.implant_types import Implant, Kind, Site
from fxprune.implants.moments import Sampling, measure
from fxprune.implants.sites import named_sites, output_scale, rows_of, sites_of, units_last
from fxprune.implants.surgery import finish, put_implant
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass, Skip
from fxprune.structure.groups import Group, find_groups


@dataclass(frozen=True)
class ImplantLowRank(Pass):
    """Insert the implants of the plan, after its removals.

    Attributes:
        kind: type of implant where the plan does not name one; ``auto`` takes the type with the
            least unexplained variance per cost saved.
        rank: rank of low-rank implants and pairs, as a fraction of the outputs; with ``auto`` it is
            used only where a 1 x 1 convolution does not apply: elsewhere the rank is the largest
            that costs no more than the 1 x 1.
        ridge: regularisation of the least squares, relative to the mean square of the inputs.
        samples: largest number of calibration samples, drawn at random.
        batch_size: largest number of samples per batch.
        positions: largest number of positions that each layer is fitted on.

    """

    kind: Literal["auto", "pointwise", "depthwise", "pair", "low-rank"] = "auto"
    rank: float = 0.25
    ridge: float = 0.0
    samples: int = 512
    batch_size: int = 64
    positions: int = 65536

    name: ClassVar[str] = "implant-low-rank"
    needs: ClassVar[Facts] = frozenset({PLAN})
    keeps: ClassVar[Facts] = frozenset({REMOVED})

    def __post_init__(self) -> None:
        if not 0 < self.rank <= 1 or self.ridge < 0:
            raise InputError("rank must lie between 0 and 1, and ridge must not be negative")

    def run(self, program: Program, context: Context) -> Outcome:
        """Reorder, fit and replace; changes counts layers."""
        plan = program.get(PLAN)
        if plan.remove and (plan.implant or plan.kinds):
            raise PreconditionError(
                "the plan still contains units to remove; run remove-channels first"
            )
        chosen = _chosen(program, plan)
        sites, skips = sites_of(program, chosen)
        affected = {
            group: units for group, units in chosen.items() if rows_of(sites, {group: units})
        }
        now, stuck = units_last(program, affected)
        places, whole = rows_of(sites, now), _whole_layers(program, plan, chosen)
        skips += [*stuck, *whole[1]]
        places |= {site: list(range(_outputs(site))) for site in whole[0]}
        moments = measure(program, list(places), context, self._sampling)
        changes, details = 0, list[dict[str, Any]]()
        for site, rows in places.items():
            found = self._fitted(program, site, rows, moments[site.node.name], plan)
            if isinstance(found, str):
                skips.append(Skip(site.node.name, found))
                continue
            details.append(_details(site, rows, found))
            put_implant(program, site, rows, found)
            changes += 1
        if changes:
            finish(program)
        else:  # the units have other numbers if they were reordered for nothing
            implant = {group.name: tuple(units) for group, units in (chosen | dict(now)).items()}
            program.put(PLAN, replace(plan, implant=implant))
        return Outcome(changes, tuple(skips), {"implants": details})

    @property
    def _sampling(self) -> Sampling:
        return Sampling(self.samples, self.batch_size, self.positions)

    def _fitted(
        self, program: Program, site: Site, rows: list[int], moments: Moments, plan: Plan
    ) -> Implant | str:
        """Fit the best of the candidates, or say why there is none."""
        kinds: list[Kind | None] = [*site.kinds(len(rows), self.rank)]
        if site.weight in plan.kinds:
            planned = Kind.parse(plan.kinds[site.weight])
            kinds = [replace(planned, rank=min(planned.rank, len(rows)))]
        elif self.kind != "auto":
            kinds = [site.kind(self.kind, len(rows), self.rank)]
        whole = site.macs(len(rows))
        cheaper = [kind for kind in kinds if kind and site.macs(len(rows), kind) < whole]
        if not cheaper:
            return "no type of implant is cheaper than the outputs that it replaces"
        weight = program.tensor(site.weight).detach()[rows]
        bias = None if site.bias is None else program.tensor(site.bias).detach()[rows]
        scale = output_scale(program, site)
        fitted = [
            fit(site, weight, bias, moments, kind, ridge=self.ridge,
                scale=None if scale is None else scale[rows])
            for kind in cheaper
        ]  # fmt: skip
        return min(
            fitted,
            key=lambda implant: (
                float(implant.unexplained.mean()) / (whole - site.macs(len(rows), implant.kind))
            ),
        )


def _chosen(program: Program, plan: Plan) -> dict[Group, tuple[int, ...]]:
    """The groups of the plan, with the units to implant."""
    found = {group.name: group for group in find_groups(program, plan.attention)}
    if missing := sorted(set(plan.implant) - set(found)):
        raise PreconditionError(
            f"the plan names groups that the program does not have: {', '.join(missing[:3])}; "
            "plan again after changing the program"
        )
    return {found[name]: units for name, units in plan.implant.items() if units}


def _whole_layers(
    program: Program, plan: Plan, chosen: Mapping[Group, Any]
) -> tuple[list[Site], list[Skip]]:
    """The layers whose kind is planned and of whose outputs none are picked: all of them."""
    picked = {slot.tensor for group in chosen for slot in group.slots if slot.dim == 0}
    return named_sites(program, set(plan.kinds) - picked)


def _outputs(site: Site) -> int:
    return shape_of(site.node)[site.channel_dim]


def _details(site: Site, rows: list[int], implant: Implant) -> dict[str, Any]:
    return {
        "layer": site.weight,
        "kind": str(implant.kind),
        "outputs": len(rows),
        "unexplained": round(float(implant.unexplained.mean()), 4),
        "macs": site.macs(len(rows), implant.kind) / site.macs(len(rows)),
    }
