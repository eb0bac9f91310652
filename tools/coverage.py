"""Test removal on whole families of models, each in its own process, and tabulate the results.

    python -m tools.coverage --suite torchvision --suite timm --out coverage.jsonl
    python -m tools.coverage --suite torchvision --suite timm --out coverage.jsonl --compile
    python -m tools.coverage --out coverage.jsonl --markdown docs/coverage.md

Every model adds one JSON line to the file; models that are already in it are skipped, so a run can
be interrupted and continued. ``--retry`` runs failed models again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tools.coverage_checks import examine
from tools.coverage_compile import examine_compile
from tools.coverage_models import load_zoo, suites
from tools.coverage_table import markdown, summary

Record = dict[str, Any]
Job = Callable[[Callable[[Record], None]], Record]
COMPILED = ("torchvision", "timm")  # the suites whose images their library describes


def main() -> None:
    """Run what is asked for, then print the summary."""
    options = _options()
    records = _read(options.out)
    for suite, name in _wanted(options):
        load_zoo(suite)
        known = records.get((suite, name))
        if options.compile:
            if suite in COMPILED and not _is_compiled(known, retry=options.retry):
                records[suite, name] = _compile(suite, name, known, options)
            continue
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


def _is_compiled(known: Record | None, *, retry: bool) -> bool:
    """Whether a model has been compiled, successfully if failures are tried again."""
    return known is not None and "compile" in known and not (retry and known["compile"] is None)


def _compile(suite: str, name: str, known: Record | None, options: argparse.Namespace) -> Record:
    """Compile a model and add the outcome to what is known of it."""
    record = {"suite": suite, "model": name, "failed": None, "why": None, "onnx": False}
    job = functools.partial(examine_compile, suite, name, options.photos)
    found = _in_process(job, options.seconds, options.gib)
    if found.get("compile_step") != "done":
        found |= {"compile": None, "compile_why": f"{found.get('compile_step')}: {found['why']}"}
    found["compile_s"] = found.pop("wall_s")
    del found["why"]
    record |= (known or {}) | found
    with options.out.open("a") as file:
        file.write(json.dumps(record) + "\n")
    outcome = record["compile"] or record["compile_why"]
    print(f"{suite}:{name} compile: {outcome}, {record['compile_s']} s", flush=True)
    return record


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
    parser.add_argument("--compile", action="store_true", help="run fxprune compile on photos")
    parser.add_argument("--photos", type=int, default=64, help="number of photos to compile with")
    parser.add_argument("--seconds", type=float, help="time limit for a model; 300, compiling 120")
    parser.add_argument("--gib", type=float, default=6, help="memory limit per model, in GiB")
    parser.add_argument("--no-onnx", dest="onnx", action="store_false", help="skip ONNX export")
    parser.add_argument("--retry", action="store_true", help="run failed models again")
    options = parser.parse_args()
    options.seconds = options.seconds or (120 if options.compile else 300)
    return options


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
    record: Record = {"suite": suite, "model": name, "onnx": options.onnx, "step": "start"}
    job = functools.partial(examine, suite, name, options.onnx)
    record |= _in_process(job, options.seconds, options.gib)
    if record["step"] != "done" and not record.get("failed"):
        record["failed"] = record["step"]
    return {"failed": None, **record}


def _in_process(job: Job, seconds: float, gib: float) -> Record:
    """Run a job in a process of its own and return all that it has told.

    ``why`` says why the process ended if that was not by itself, and ``wall_s`` how long it took.
    """
    start = time.monotonic()
    record: Record = {"why": None}
    # Forked, so that what the parent has imported need not be imported for every model.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(job, gib, sender))
    child.start()
    sender.close()
    why = None
    try:
        while receiver.poll(max(start + seconds - time.monotonic(), 0)):
            record.update(receiver.recv())
        why = f"not done within {seconds:g} s"
        child.kill()
    except EOFError:
        child.join()
        why = f"the process ended with {child.exitcode}" if child.exitcode else None
    child.join()
    return {**record, "why": why or record["why"], "wall_s": round(time.monotonic() - start, 1)}


def _child(job: Job, gib: float, sender: Connection) -> None:
    """Run a job here, telling the record after every step."""
    limit = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        sender.send(job(sender.send))


if __name__ == "__main__":
    main()
