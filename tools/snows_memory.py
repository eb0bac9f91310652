"""Measure memory and time of masks and a lookahead on vision transformers.

    python -m tools.snows_memory vit_l_16 --out DIR                    # a file per four blocks
    python -m tools.snows_memory vit_l_16 --out DIR --blocks 2 --images 8 --at-once 1  # a trial

Weights and images are random, which changes no size. In-projections, out-projections and both
layers of the MLPs get 2:4 masks and are re-fitted with a lookahead of three operators, some blocks
at a time. Their results and weights are files, and existing files are not measured again. Every
piece runs the blocks before it again. Prints seconds, the peak resident memory of the process, and
the losses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fxprune import trace
from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.graph.facts import MASKS
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.host import peak_memory
from fxprune.passes import Reconstruct, Sparsify
from fxprune.pipeline.context import Context

SIZES = {  # blocks, heads, width, width of the MLP
    "vit_b_16": (12, 12, 768, 3072),
    "vit_l_16": (24, 16, 1024, 4096),
}
PROTECT = ("conv_proj", "heads.*")
GIB = 2**30


def build(name: str, blocks: int | None) -> Program:
    """Trace a vision transformer of torchvision with random weights."""
    from fxprune.models.compat import enable_torchvision

    enable_torchvision()
    from torchvision.models import VisionTransformer

    depth, heads, width, inner = SIZES[name]
    torch.manual_seed(0)
    model = VisionTransformer(224, 16, min(depth, blocks or depth), heads, width, inner).eval()
    return trace(model, (torch.randn(2, 3, 224, 224),))


def measure(
    program: Program, context: Context, step: Reconstruct, at_once: int, out: Path
) -> Iterator[dict[str, Any]]:
    """Mend block after block, and yield what each piece came to, from its file if there is one."""
    weights = program.get(MASKS).keep
    blocks = {name.partition(".encoder_layer_")[2].partition(".")[0] for name in weights}
    numbers = sorted(int(block) for block in blocks)
    for start in range(0, len(numbers), at_once):
        piece = numbers[start : start + at_once]
        only = tuple(f"encoder.layers.encoder_layer_{number}.*" for number in piece)
        told, stored = (out / f"blocks-{piece[0]}.{kind}" for kind in ("json", "safetensors"))
        if told.exists():
            for name, value in load_file(stored).items():
                set_tensor(program, name, value)
        else:
            found = _mend(program, context, replace(step, only=only))
            changed = {name: t for name, t in program.graph_module.state_dict().items()
                       if any(fnmatchcase(name, glob) for glob in only)}  # fmt: skip
            save_file(changed, stored)
            told.with_suffix(".part").write_text(json.dumps(found))
            told.with_suffix(".part").rename(told)
        yield json.loads(told.read_text())


def _mend(program: Program, context: Context, step: Reconstruct) -> dict[str, Any]:
    start = time.perf_counter()
    outcome = step(program, context)
    peak = peak_memory()
    return {
        "seconds": time.perf_counter() - start,
        "peak_gib": None if peak is None else peak / GIB,
        "details": outcome.details,
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield what a piece took, and then a line per layer: losses, seconds, steps."""
    told = found["details"]["lookahead"][-1]
    peak = "unknown" if found["peak_gib"] is None else f"{found['peak_gib']:.2f} GiB"
    first = sum(layer["seconds"] for layer in found["details"]["layers"])
    yield (
        f"{len(told['layers'])} layers in {found['seconds']:.0f} s ({first:.0f} s of least "
        f"squares), peak {peak}, batches of {told['batch_size']}, on disk {told['spilled_gib']} GiB"
    )
    for layer in told["layers"]:
        yield (
            f"  {layer['layer']}: {layer['before']:.4g} -> {layer['after']:.4g}, "
            f"{layer['seconds']:.1f} s, {layer['cg_steps']} steps"
        )


def main() -> None:
    """Mask and mend a vision transformer, and tell what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("network", choices=sorted(SIZES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, help="number of blocks of the network (default: all)")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--memory", type=float, default=4.0, help="memory for activations, in GiB")
    parser.add_argument("--at-once", type=int, default=4, help="blocks per piece")
    parser.add_argument("--pieces", type=int, help="number of pieces to run (default: all)")
    parser.add_argument("--pattern", default="2:4")
    options = parser.parse_args()
    size = options.blocks or "all"
    out = options.out / f"{options.network}-{size}-{options.images}-{options.at_once}"
    out.mkdir(parents=True, exist_ok=True)
    program = build(options.network, options.blocks)
    images = torch.randn(options.images, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    context = Context(Data(Arrays(images)), dense=program.copy(share=True))
    Sparsify(pattern=options.pattern, protect=PROTECT)(program, context)
    step = Reconstruct(samples=options.images, lookahead=3, memory_gib=options.memory)
    pieces = measure(program, context, step, options.at_once, out)
    for found in itertools.islice(pieces, options.pieces):
        print("\n".join(lines(found)), flush=True)


if __name__ == "__main__":
    main()
