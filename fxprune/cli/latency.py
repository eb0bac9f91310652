"""``fxprune latency kit``: what another machine needs so that plans can be made for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxprune.cli.exits import exits
from fxprune.cli.options import (
    Arch,
    ArchOption,
    Crop,
    DataName,
    DataOption,
    Debug,
    ImageSize,
    InputShape,
    Interpolation,
    Mean,
    Model,
    Std,
    Trust,
)
from fxprune.cli.request import Request
from fxprune.cli.traced import traced
from fxprune.graph.facts import Preference
from fxprune.latency.kit import write_kit
from fxprune.run.kit_samples import kit_samples
from fxprune.run.output import check_writable, prepare

latency_app = typer.Typer(
    help="Plan for the latency of another machine.", no_args_is_help=True, rich_markup_mode=None
)


@latency_app.callback()
def _group() -> None:
    """Plan for the latency of another machine."""


@latency_app.command("kit")
def kit_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="zip file to write")] = Path("kit.zip"),
    arch: Arch = None,
    arch_option: ArchOption = None,
    data: DataName = None,
    data_option: DataOption = None,
    input_shape: InputShape = None,
    image_size: ImageSize = None,
    crop: Crop = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    trust_pickle: Trust = False,
    attention: Annotated[
        Preference, typer.Option(help="remove whole heads, or narrow every head")
    ] = "heads",
    samples: Annotated[
        int, typer.Option(min=1, help="largest number of evaluation samples to judge models on")
    ] = 500,
    debug: Debug = False,
) -> None:
    """Write a zip file that measures a model's operators, and judges models, on another machine."""
    with exits(debug):
        check_writable(out.parent)
        request = Request(
            model, arch, tuple(arch_option or ()), data, tuple(data_option or ()), input_shape,
            image_size, crop, interpolation, mean, std, trust_pickle=trust_pickle,
        )  # fmt: skip
        program, found = traced(request)
        judged = None if found is None else kit_samples(program, found, samples)
        count = write_kit(program, prepare(out.parent) / out.name, judged, attention)
        print(
            f"wrote {out}: {count} operators, {0 if judged is None else len(judged.labels)} "
            f"samples; on the machine run: python {out.name} times -o table.json"
        )
