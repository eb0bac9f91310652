"""What a run has done so far, kept after every pass so that a killed run can be resumed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxprune.errors import InputError
from fxprune.files import write_text
from fxprune.graph import serialize
from fxprune.graph.cost import Cost
from fxprune.graph.facts import PLAN, REMOVED, SENSITIVITY, Plan, Sensitivity
from fxprune.graph.program import Program
from fxprune.pipeline.contract import Outcome, Pass, ReportTable, Skip
from fxprune.pipeline.driver import Entry

FOLDER = ".fxprune-checkpoint"
CURVE_POINTS = 64


@dataclass
class Journal:
    """What the passes did so far, for the report.

    Attributes:
        entries: one per finished pass.
        removed: by group, how many units are gone.
        implanted: by group, how many units were replaced.
        curves: by group, its units' scores in rising order, thinned to 64.

    """

    entries: list[Entry] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)
    implanted: dict[str, int] = field(default_factory=dict)
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def add(self, step: Pass, entry: Entry, program: Program, plan: Plan | None) -> None:
        """Note a finished pass; ``plan`` is the one that held before it."""
        self.entries.append(entry)
        if SENSITIVITY in step.gives and not self.curves:
            self.curves = _curves(program.get(SENSITIVITY))
        if plan is None or PLAN not in step.needs or not entry.outcome.changes:
            return
        if REMOVED in step.gives:
            _count(self.removed, plan.remove)
        else:
            _count(self.implanted, plan.implant)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; ``from_json`` undoes it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Journal:
        """Read what ``to_json`` gave."""
        return cls(
            [_entry(item) for item in content["entries"]],
            content["removed"],
            content["implanted"],
            {name: tuple(curve) for name, curve in content["curves"].items()},
        )


def _count(counts: dict[str, int], units: Mapping[str, Sequence[int]]) -> None:
    for name, numbers in units.items():
        counts[name] = counts.get(name, 0) + len(numbers)


def _entry(content: dict[str, Any]) -> Entry:
    outcome = dict(content["outcome"])
    outcome["skips"] = tuple(Skip(**skip) for skip in outcome["skips"])
    outcome["notes"] = tuple(outcome["notes"])
    outcome["tables"] = tuple(_table(**table) for table in outcome["tables"])
    return Entry(
        content["spec"],
        content["seconds"],
        Outcome(**outcome),
        Cost(**content["before"]),
        Cost(**content["after"]),
    )


def _table(title: str, columns: list[str], rows: list[list[str]]) -> ReportTable:
    return ReportTable(title, tuple(columns), tuple(map(tuple, rows)))


def _curves(sensitivity: Sensitivity) -> dict[str, tuple[float, ...]]:
    curves = {}
    for name, scores in sensitivity.scores.items():
        rising = scores.detach().double().cpu().sort().values
        chosen = torch.linspace(0, len(rising) - 1, min(CURVE_POINTS, len(rising))).round().long()
        curves[name] = tuple(rising[chosen].tolist())
    return curves


@dataclass(frozen=True)
class Checkpoint:
    """A folder with the program and the journal as they were after the last finished pass.

    Attributes:
        folder: the output folder of the run; None keeps nothing.
        fingerprint: of the model and the options; a checkpoint with another one is refused.
        specs: the passes of the run; those that are finished must be the first of them.

    """

    folder: Path | None
    fingerprint: str
    specs: tuple[str, ...]

    @classmethod
    def none(cls) -> Checkpoint:
        """Return a checkpoint that keeps nothing."""
        return cls(None, "", ())

    @property
    def exists(self) -> bool:
        """Whether a finished pass is kept."""
        return self.folder is not None and _state(self.folder).exists()

    def save(self, program: Program, journal: Journal) -> None:
        """Replace what is kept; a kill at any moment leaves the old or the new."""
        if self.folder is None:
            return
        place = _state(self.folder).parent
        place.mkdir(exist_ok=True)
        name = f"{len(journal.entries):03d}.fxprune"
        serialize.save(program, place / name)
        content = {"fingerprint": self.fingerprint, "program": name, "journal": journal.to_json()}
        write_text(_state(self.folder), json.dumps(content, default=str))
        for old in place.glob("*.fxprune"):
            if old.name != name:
                old.unlink()

    def load(self) -> tuple[Program, Journal] | None:
        """Return what was kept, or None if there is nothing.

        Raises:
            InputError: it belongs to another run, or is damaged.

        """
        if self.folder is None or not self.exists:
            return None
        state, advice = _state(self.folder), "run without --resume to start from the beginning"
        try:
            content = json.loads(state.read_text(encoding="utf-8"))
            journal = Journal.from_json(content["journal"])
            finished = tuple(entry.spec for entry in journal.entries)
            same = content["fingerprint"] == self.fingerprint
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"the checkpoint in {self.folder} is damaged; {advice}") from error
        if not same or finished != self.specs[: len(finished)]:
            what = "the finished passes" if same else "the model, the data or the options"
            raise InputError(
                f"the checkpoint in {self.folder} belongs to another run: {what} have changed; "
                f"{advice}"
            )
        return serialize.load(state.parent / content["program"]), journal

    def drop(self) -> None:
        """Remove what is kept."""
        if self.folder is not None:
            shutil.rmtree(self.folder / FOLDER, ignore_errors=True)


def _state(folder: Path) -> Path:
    """The file that says what is kept."""
    return folder / FOLDER / "state.json"


@contextmanager
def resumable(checkpoint: Checkpoint) -> Iterator[None]:
    """Add to any failure that finished passes are kept."""
    try:
        yield
    except BaseException as error:
        if checkpoint.exists:
            error.add_note("finished passes are kept; run again with --resume to continue")
        raise


def fingerprint(program: Program, options: Iterable[object]) -> str:
    """Return a hash of a program's graph and tensors and of the text of some options."""
    digest = hashlib.sha256(program.graph_module.code.encode())
    for name, tensor in program.graph_module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for option in options:
        digest.update(f"\n{option}".encode())
    return digest.hexdigest()
