"""The program of the model that the command line names."""

from __future__ import annotations

from fxprune.cli.request import Request
from fxprune.data.batches import batches
from fxprune.data.roles import Data
from fxprune.errors import InputError
from fxprune.graph.program import Program
from fxprune.graph.trace import trace
from fxprune.pipeline.progress import Tracker


def traced(request: Request) -> tuple[Program, Data | None]:
    """Load the model and the data that a request names, and trace the model.

    Raises:
        InputError: the model cannot be traced, or nothing gives the shape of its input.

    """
    model = request.load_model()
    data = request.load_data(0, model)
    if isinstance(model, Program):
        return model, data
    inputs = request.example_inputs()
    notes: tuple[str, ...] = ()
    if inputs is None and data is not None:
        inputs, notes = next(batches(data.calibration, 1)).inputs, data.notes
    if inputs is None:
        raise InputError(
            "cannot infer the input shape; pass --input-shape 3,224,224 or --data DATA"
        )
    program = trace(model, inputs)
    for note in notes:
        Tracker(notes=True).note(note)
    return program, data
