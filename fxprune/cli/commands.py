"""The command line: ``fxprune compile``, ``inspect``, ``bench`` and ``passes``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fxprune import passes as registry
from fxprune.cli.allocator import keep_freed_memory
from fxprune.cli.exits import exits
from fxprune.cli.latency import latency_app
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
    Json,
    LatencyShape,
    Mean,
    Model,
    Provider,
    Std,
    Threads,
    Trust,
    Words,
)
from fxprune.cli.pick import pick_command
from fxprune.cli.request import Request, read_text, split, typed
from fxprune.cli.traced import traced
from fxprune.errors import InputError
from fxprune.files import write_text
from fxprune.graph.facts import Preference
from fxprune.onnx.benchmark import CPU, compare, fallback_note, parse_shapes
from fxprune.pipeline.progress import Tracker
from fxprune.pipeline.text import Recipe, parse, read_recipe
from fxprune.report.inspection import inspect as inspect_program
from fxprune.report.inspection import print_inspection
from fxprune.report.inspection_html import inspection_html
from fxprune.report.listing import describe, print_passes
from fxprune.report.table import print_latencies, print_report
from fxprune.run.compile import compile as compile_model
from fxprune.run.options import Objective
from fxprune.run.output import check_writable, prepare

app = typer.Typer(
    help="Make trained PyTorch models physically smaller, export ONNX and verify the result.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None,
)  # fmt: skip


@app.command("compile")
def compile_command(
    model: Annotated[
        str | None, typer.Argument(help="model file: state dict, exported program or module")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write the results to")] = Path(
        "out"
    ),
    data: DataName = None,
    data_option: DataOption = None,
    arch: Arch = None,
    arch_option: ArchOption = None,
    input_shape: InputShape = None,
    image_size: ImageSize = None,
    crop: Crop = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    target: Annotated[
        Words,
        typer.Option(
            help="limit on macs, params, size or latency: macs=50%, macs=2x, size=1MB; repeatable"
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="largest accuracy loss allowed, in percentage points; without --target, search "
            "for the fastest model within it (default: 1; see --objective)"
        ),
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(help="what to minimize in a search without --target (default: latency)"),
    ] = None,
    search_minutes: Annotated[
        float | None,
        typer.Option(min=0, help="how long to search for the best model (default: 15)"),
    ] = None,
    frontier: Annotated[
        str | None,
        typer.Option(help="also write models at these speed-ups, e.g. 1.5x,2x,3x,4x"),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=0, help="epochs of fine-tuning (default: 0)")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="number of pruning rounds; --epochs is divided among them (default: 1)"
        ),
    ] = None,
    attention: Annotated[
        Preference | None,
        typer.Option(help="remove whole heads, or narrow every head (default: heads)"),
    ] = None,
    int8: Annotated[
        bool | None,
        typer.Option(
            "--int8/--fp32",
            help="emit INT8 or FP32 (default: INT8 if it is faster and about as accurate)",
        ),
    ] = None,
    standard_onnx: Annotated[
        bool | None,
        typer.Option(
            "--standard-onnx",
            help="use only operators of the ONNX standard (default: faster ones of ONNX Runtime)",
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="read the run from a TOML file; options override it")
    ] = None,
    passes: Annotated[
        str | None, typer.Option(help="run this pipeline of passes: a,b{x=1},c")
    ] = None,
    calibration: Annotated[
        int | None, typer.Option(help="largest number of calibration samples")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="batch size of evaluation (default: 128)")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="seed of all random numbers (default: 0)")
    ] = None,
    device: Annotated[str | None, typer.Option(help="run on cpu (default) or cuda")] = None,
    threads: Threads = None,
    provider: Provider = None,
    latency_table: Annotated[
        Path | None,
        typer.Option(help="plan for the machine on which a latency kit wrote this file"),
    ] = None,
    latency_shape: LatencyShape = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            help="check on random units that removing them equals zeroing them (default: on)"
        ),
    ] = None,
    onnx: Annotated[
        bool | None,
        typer.Option(
            help="write model.onnx, and compare and time it in ONNX Runtime (default: on)"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue an interrupted run in the same folder")
    ] = False,
    trust_pickle: Trust = False,
    debug: Debug = False,
    quiet_run: Annotated[bool, typer.Option("--quiet", "-q", help="print errors only")] = False,
) -> None:
    """Make a model smaller; write model.onnx, model.pt2 and a report to the folder OUT."""
    given = {**locals()}
    for name in ("out", "recipe", "passes", "resume", "debug", "quiet_run"):
        del given[name]
    with exits(debug):
        check_writable(out)
        known = registry.known()
        wanted = Recipe()
        if recipe is not None:
            wanted = read_recipe(read_text(recipe, "--recipe"), known, f"the recipe {recipe}")
        told = typed(wanted.options, f"the recipe {recipe}")
        told |= {name: value for name, value in given.items() if value is not None}
        pipeline = parse(passes, known) if passes else wanted.pipeline
        request, options = split(told)
        progress = Tracker(False if quiet_run else None, notes=not quiet_run)
        loaded = request.load_model()
        samples = request.load_data(options.get("seed", 0), loaded)
        result = compile_model(
            loaded, request.example_inputs(), data=samples, out=out, resume=resume,
            pipeline=pipeline, progress=progress, origin=request.recipe_fields(), **options,
        )  # fmt: skip
        if not quiet_run:
            print_report(result.report, Console())
            print(f"\nwrote {', '.join(result.files)} in {out}")
    raise typer.Exit(0 if result.report.ok else 1)


app.command("pick")(pick_command)
app.add_typer(latency_app, name="latency")


@app.command("inspect")
def inspect_command(
    model: Model,
    arch: Arch = None,
    arch_option: ArchOption = None,
    data: DataName = None,
    data_option: DataOption = None,
    input_shape: InputShape = None,
    image_size: ImageSize = None,
    crop: Crop = None,
    interpolation: Interpolation = None,
    trust_pickle: Trust = False,
    attention: Annotated[
        Preference, typer.Option(help="remove whole heads, or narrow every head")
    ] = "heads",
    html: Annotated[Path | None, typer.Option(help="draw the graph into this HTML file")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List what can be removed, how much that saves, and what is frozen and why."""
    with exits(debug):
        request = Request(
            model, arch, tuple(arch_option or ()), data, tuple(data_option or ()), input_shape,
            image_size, crop, interpolation, trust_pickle=trust_pickle,
        )  # fmt: skip
        if html is not None:
            check_writable(html.parent)
        program, _ = traced(request)
        found = inspect_program(program, attention)
        if html is not None:
            write_text(prepare(html.parent) / html.name, inspection_html(program, found))
        if as_json:
            print(found.to_json())
        else:
            print_inspection(found, Console())


@app.command("bench")
def bench_command(
    models: Annotated[
        list[Path], typer.Argument(help="ONNX files; speed-ups compare with the first")
    ],
    batch: Annotated[int, typer.Option(min=1, help="size of dynamic dimensions")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="threads of ONNX Runtime")] = 1,
    seconds: Annotated[float, typer.Option(min=0, help="measure for this many seconds")] = 5.0,
    provider: Provider = None,
    latency_shape: LatencyShape = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare the latency of ONNX files in ONNX Runtime, interleaved, on random inputs."""
    with exits(debug):
        found = compare(
            {str(path): path for path in models}, batch=batch, threads=threads, seconds=seconds,
            provider=provider or CPU, shapes=parse_shapes(latency_shape or ()),
        )  # fmt: skip
        if note := fallback_note(found, provider or CPU):
            Tracker(notes=True).note(note)
        if as_json:
            print(json.dumps({name: asdict(latency) for name, latency in found.items()}, indent=2))
        else:
            print_latencies(found, Console())


@app.command("passes")
def passes_command(
    names: Annotated[Words, typer.Argument(help="names of the passes to list")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List all passes: what each does, its options and defaults, the facts it needs and gives."""
    with exits(debug):
        known = registry.known()
        if unknown := sorted(set(names or ()) - set(known)):
            raise InputError(f"there is no pass '{unknown[0]}'; the passes are {', '.join(known)}")
        steps = [known[name] for name in names or known]
        if as_json:
            print(json.dumps([describe(step) for step in steps], indent=2))
        else:
            print_passes(steps, Console())


def main() -> None:
    """Run the command line."""
    keep_freed_memory()
    app()
