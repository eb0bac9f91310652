"""Try removal on whole families of models, each in a process of its own, and tabulate the result.

    python -m tools.coverage --suite torchvision --suite timm --out coverage.jsonl
    python -m tools.coverage --out coverage.jsonl --markdown docs/coverage.md

Every model adds one JSON line to the file; models that are already there are skipped, so that a
run can be broken off and taken up again. ``--retry`` tries the failed ones once more.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tools.coverage_table import markdown, summary

ROOT = Path(__file__).resolve().parent.parent
Record = dict[str, Any]


def main() -> None:
    """Run what is asked for, then print the summary."""
    options = _options()
    if options.one:
        _child(*options.one.split(":"), onnx=options.onnx)
        return
    records = _read(options.out)
    for suite, name in _wanted(options):
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
        options.markdown.write_text(markdown(list(records.values()), options.command))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", action="append", default=[], help="a suite; may be repeated")
    parser.add_argument("--model", action="append", default=[], help="suite:name, for single ones")
    parser.add_argument("--out", type=Path, default=Path("coverage.jsonl"), help="JSON lines")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--command", default="python -m tools.coverage", help="quoted in the table")
    parser.add_argument("--seconds", type=float, default=300, help="time limit for a model")
    parser.add_argument("--gib", type=float, default=6, help="memory limit for a model")
    parser.add_argument("--no-onnx", dest="onnx", action="store_false", help="leave ONNX out")
    parser.add_argument("--retry", action="store_true", help="run failed models again")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def _wanted(options: argparse.Namespace) -> list[tuple[str, str]]:
    wanted = [(item.split(":", 1)[0], item.split(":", 1)[1]) for item in options.model]
    if options.suite:
        from tools.coverage_models import suites  # needs the model zoos, which the table does not

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
    command = [sys.executable, "-m", "tools.coverage", "--one", f"{suite}:{name}"]
    command += [] if options.onnx else ["--no-onnx"]
    limit = int(options.gib * 2**30)
    start, why = time.monotonic(), ""
    record: Record = {"suite": suite, "model": name, "onnx": options.onnx, "step": "start"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=options.seconds)
            why = errors.strip().splitlines()[-1] if process.returncode and errors.strip() else ""
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            why = f"not done within {options.seconds:g} s"
    lines = [line for line in output.splitlines() if line.startswith("{")]
    record.update(json.loads(lines[-1]) if lines else {})
    if record["step"] != "done" and not record.get("failed"):
        ended = f"the process ended with {process.returncode}"
        record.update(failed=record["step"], why=why or ended)
    return {"failed": None, "why": None, **record, "wall_s": round(time.monotonic() - start, 1)}


def _child(suite: str, name: str, *, onnx: bool) -> None:
    """Examine one model here, printing the record after every step."""
    import torch

    from tools.coverage_checks import examine

    torch.set_num_threads(1)
    print(json.dumps(examine(suite, name, onnx, lambda r: print(json.dumps(r), flush=True))))


if __name__ == "__main__":
    main()
