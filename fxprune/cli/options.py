"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Words = list[str] | None
Model = Annotated[str, typer.Argument(help="model file: state dict, exported program or module")]
Arch = Annotated[
    str | None,
    typer.Option(
        help="architecture of a state dict: torchvision:NAME, timm:NAME or package.module:factory"
    ),
]
ArchOption = Annotated[
    Words, typer.Option(help="pass name=value to the architecture's factory; repeatable")
]
DataName = Annotated[
    str | None,
    typer.Option(help="data set: image folder, .npz file, digits or package.module:factory"),
]
DataOption = Annotated[
    Words, typer.Option(help="pass name=value to the data's factory; repeatable")
]
InputShape = Annotated[
    str | None, typer.Option(help="shape of one sample, e.g. 3,32,32 (default: from the data)")
]
ImageSize = Annotated[
    str | None,
    typer.Option(help="resize and crop images to this size, e.g. 224 (default: the model's)"),
]
Mean = Annotated[
    str | None, typer.Option(help="per-channel mean, for pixels scaled to [0, 1], e.g. 0.5,0.5,0.5")
]
Std = Annotated[
    str | None, typer.Option(help="per-channel standard deviation, for pixels scaled to [0, 1]")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-pickle", help="allow unpickling, which can execute code stored in the file"
    ),
]
Crop = Annotated[
    float | None,
    typer.Option(
        help="fraction of a resized image that the crop keeps, e.g. 0.875 (default: the model's)"
    ),
]
Interpolation = Annotated[
    str | None,
    typer.Option(help="filter to resize images, e.g. bicubic (default: the model's)"),
]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks and all warnings")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Provider = Annotated[
    str | None,
    typer.Option(
        help="execution provider of ONNX Runtime that latency is measured with "
        "(default: CPUExecutionProvider)"
    ),
]
LatencyShape = Annotated[
    Words,
    typer.Option(help="measure latency at this shape of an input, e.g. input_ids=1x26; repeatable"),
]
Threads = Annotated[int | None, typer.Option(min=1, help="threads of PyTorch and ONNX Runtime")]
