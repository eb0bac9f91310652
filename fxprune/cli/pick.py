"""``fxprune pick``: another model from the search of an earlier compile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fxprune import passes as registry
from fxprune.cli.exits import exits
from fxprune.cli.options import (
    Debug,
    Trust,
)
from fxprune.cli.request import read_text, split, typed
from fxprune.pipeline.text import read_recipe
from fxprune.report.table import print_report
from fxprune.run.compile import compile as compile_model
from fxprune.run.options import Options, pipeline_for_plan
from fxprune.run.output import check_writable
from fxprune.run.search_record import FILE as SEARCH
from fxprune.run.search_record import pick


def pick_command(
    folder: Annotated[Path, typer.Argument(help="results of a compile that searched")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the results")],
    max_drop: Annotated[
        float | None, typer.Option(help="largest accuracy loss allowed, in percentage points")
    ] = None,
    latency: Annotated[
        str | None, typer.Option(help="largest latency allowed, e.g. 2ms, 50% or 2x")
    ] = None,
    trust_pickle: Trust = False,
    debug: Debug = False,
) -> None:
    """Make another model from the search of an earlier compile, without searching again."""
    with exits(debug):
        check_writable(out)
        plan = pick(folder / SEARCH, max_drop=max_drop, latency=latency)
        recipe = folder / "recipe.toml"
        read = read_recipe(read_text(recipe, "recipe"), registry.known(), f"the recipe {recipe}")
        request, options = split(typed(read.options, f"the recipe {recipe}"))
        request = replace(request, trust_pickle=trust_pickle)
        options |= {"max_drop": max_drop}
        result = compile_model(
            request.load_model(), request.example_inputs(), out=out,
            data=request.load_data(options.get("seed", 0)),
            pipeline=pipeline_for_plan(plan, Options()), origin=request.recipe_fields(), **options,
        )  # fmt: skip
        print_report(result.report, Console())
        print(f"\nwrote {', '.join(result.files)} in {out}")
    raise typer.Exit(0 if result.report.ok else 1)
