"""Test removal on whole families of models, each in its own process, and tabulate the results.

    python -m tools.coverage --suite torchvision --suite timm --out coverage.jsonl
    python -m tools.coverage --out coverage.jsonl --markdown docs/coverage.md

Every model adds one JSON line to the file; models that are already in it are skipped, so a run can
be interrupted and continued. ``--retry`` runs failed models again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import resource
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tools.coverage_checks import examine
from tools.coverage_models import load_zoo, suites
from tools.coverage_table import markdown, summary

Record = dict[str, Any]


def main() -> None:
    """Run what is asked for, then print the summary."""
    options = _options()
    records = _read(options.out)
    for suite, name in _wanted(options):
        load_zoo(suite)
        known = records.get((suite, name))
        if known and not (options.retry and known["failed"]) and known["onnx"] >= options.onnx:
            continue
        record = _run(suite, name, options)
        records[suite, name] = record
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{suite}:{name}", record["failed"] or "passes", record["why"] or "", flush=True)
    print(summary(list(records.values())))
    if options.markdown:
        listed = {name: len(models()) for name, models in suites().items()}
        options.markdown.write_text(markdown(list(records.values()), options.command, listed))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", action="append", default=[], help="name of a suite; repeatable")
    parser.add_argument(
        "--model", action="append", default=[], help="run one model, suite:name; repeatable"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("coverage.jsonl"), help="file of JSON lines"
    )
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument(
        "--command", default="python -m tools.coverage", help="command to quote in the table"
    )
    parser.add_argument(
        "--seconds", type=float, default=300, help="time limit per model, in seconds"
    )
    parser.add_argument("--gib", type=float, default=6, help="memory limit per model, in GiB")
    parser.add_argument("--no-onnx", dest="onnx", action="store_false", help="skip ONNX export")
    parser.add_argument("--retry", action="store_true", help="run failed models again")
    return parser.parse_args()


def _wanted(options: argparse.Namespace) -> list[tuple[str, str]]:
    wanted = [(item.split(":", 1)[0], item.split(":", 1)[1]) for item in options.model]
    if options.suite:
        known = suites()
        if unknown := set(options.suite) - set(known):
            raise SystemExit(f"no suite {', '.join(unknown)}; there are {', '.join(known)}")
        wanted += [(suite, name) for suite in options.suite for name in known[suite]()]
    return wanted


def _read(path: Path) -> dict[tuple[str, str], Record]:
    """Return the last record of every model."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.strip()]
    return {(record["suite"], record["model"]): record for record in records}


def _run(suite: str, name: str, options: argparse.Namespace) -> Record:
    """Examine one model in a process of its own, within limits of time and memory."""
    start = time.monotonic()
    record: Record = {"suite": suite, "model": name, "onnx": options.onnx, "step": "start"}
    # Forked, so that what the parent has imported need not be imported for every model.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(suite, name, options.onnx, options.gib, sender))
    child.start()
    sender.close()
    why = None
    try:
        while receiver.poll(max(start + options.seconds - time.monotonic(), 0)):
            record.update(receiver.recv())
        why = f"not done within {options.seconds:g} s"
        child.kill()
    except EOFError:
        child.join()
        why = f"the process ended with {child.exitcode}"
    child.join()
    if record["step"] != "done" and not record.get("failed"):
        record.update(failed=record["step"], why=why)
    return {"failed": None, "why": None, **record, "wall_s": round(time.monotonic() - start, 1)}


def _child(suite: str, name: str, onnx: bool, gib: float, sender: Connection) -> None:
    """Examine one model here, telling the record after every step."""
    limit = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        sender.send(examine(suite, name, onnx, sender.send))


if __name__ == "__main__":
    main()
