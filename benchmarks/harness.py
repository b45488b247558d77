"""What benchmarks of (model, setting) rows share: a process for each row, a JSON file that is added to, a line on the terminal.

A row is made in a process of its own, so that its peak memory is its own. Rows that are in the JSON file already and are not asked for
stay. Of results that were left in a folder, latency can be measured afterwards, on a quiet machine: original and result in turns on the
same inputs, on one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import corpus

from onnxshrink import api

__all__ = ["Row", "run_rows"]

Row = dict[str, Any]
_SECONDS = 10.0


def run_rows(
    doc: str | None, rows: Sequence[tuple[str, str]], measure: Callable[[str, str, Path], Row], describe: Callable[[Row], str]
) -> None:
    """Runs what the command line asks for.

    Args:
        doc: of the script, for its help.
        rows: (model, setting) of all rows.
        measure: (model, setting, where the result goes) -> figures; called in a process of its own.
        describe: one line about the figures.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--setting", nargs="*", help="options of the pass, instead of the rows' own")
    parser.add_argument("--models", type=Path, default=Path("results"), help="folder for the resulting models")
    parser.add_argument("--latency", action="store_true", help="measure the latency of the results that are there")
    parser.add_argument("--json", type=Path, help="where the figures go after each row")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, setting, path = json.loads(arguments.one)
        print(json.dumps(measure(name, setting, Path(path))))
        return
    chosen = [row for row in rows if not arguments.only or row[0] in arguments.only]
    if arguments.setting:
        chosen = [(name, setting) for name in dict.fromkeys(name for name, _ in chosen) for setting in arguments.setting]
    known: dict[tuple[str, str], Row] = {}
    if arguments.json and arguments.json.exists():
        known = {(row["name"], row["setting"]): row for row in json.loads(arguments.json.read_text())["models"]}
    order = {row: number for number, row in enumerate(rows)}
    arguments.models.mkdir(parents=True, exist_ok=True)
    for name, setting in chosen:
        path = arguments.models / f"{name} {setting}.onnx"
        if not arguments.latency:
            known[name, setting] = _measured(name, setting, path)
        elif path.exists() and (name, setting) in known:
            known[name, setting] |= _timed(name, path)
        else:
            continue
        print(_line(known[name, setting], describe), flush=True)
        if arguments.json:
            ordered = sorted(known, key=lambda row: (order.get(row, len(order)), row))
            arguments.json.write_text(json.dumps({"models": [known[row] for row in ordered]}, indent=1) + "\n")


def _measured(name: str, setting: str, path: Path) -> Row:
    """Returns a row, made in a process of its own."""
    command = [sys.executable, sys.argv[0], "--one", json.dumps([name, setting, str(path)])]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        reason = [f"exit code {run.returncode}", *run.stderr.strip().splitlines()][-1]
        return {"name": name, "setting": setting, "error": reason[-300:]}
    row: Row = json.loads(run.stdout.splitlines()[-1])
    return row


def _timed(name: str, path: Path) -> Row:
    """Returns the latency of a result next to its original's."""
    found = api.bench(corpus.model_path(name), path, inputs=corpus.calibration(name), seconds=_SECONDS)
    ratio = found.ratio
    return {"latency": ratio.median, "latency_low": ratio.low, "latency_high": ratio.high, "original_ms": found.a_ms.median}


def _line(row: Row, describe: Callable[[Row], str]) -> str:
    return f"{row['name']:22} {row['setting']:56} {row.get('error') or describe(row)}"
