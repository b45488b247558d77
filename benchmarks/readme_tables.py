"""Writes the measured tables of the README from the JSON files under benchmarks/results.

    python benchmarks/readme_tables.py          # rewrites README.md
    python benchmarks/readme_tables.py --check  # exit code 1 if it is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxshrink.report import format_share

ROOT = Path(__file__).resolve().parents[1]


def share_8bit(figures: dict[str, Any]) -> list[str]:
    """Returns the table of `share_8bit.py`."""
    lines = ["| model | bytes | with 8-bit codes | ratio | SQNR dB | agreement | seconds | peak MB |", "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for row in figures["models"]:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['error']} |||||||")
            continue
        sqnr = "exact" if row["sqnr_db"] >= 300 else f"{row['sqnr_db']:.1f}"
        agreement = "–" if row["agreement"] is None else format_share(row["agreement"])
        lines.append(
            f"| {row['name']} | {row['bytes_before']:,} | {row['bytes_after']:,} | {row['ratio']:.2f} | {sqnr} | {agreement} "
            f"| {row['seconds']:.1f} | {row['peak_mb']:.0f} |"
        )
    return lines


def large_model(figures: dict[str, Any]) -> list[str]:
    """Returns the table of `large_model.py`."""
    size = f"{figures['model_bytes'] / 1e9:.2f} GB"
    seconds = [f"{figures[f'{step}_seconds']:.1f}" for step in ("load", "edit", "save")]
    lines = ["| model | load s | edit s | save s | peak MB beyond the imports |", "|--:|--:|--:|--:|--:|"]
    return [*lines, f"| {size} | {' | '.join(seconds)} | {figures['peak_mb']:.0f} |"]


def session_start(figures: dict[str, Any]) -> list[str]:
    """Returns the table of `session_start.py`."""
    lines = ["| `share-weights` options | file MB | session start s | peak MB |", "|---|--:|--:|--:|"]
    return lines + [
        f"| {row['form']} | {row['file_mb']:.1f} | {row['seconds']:.1f} | {row['peak_mb']:.0f} |" for row in figures["forms"]
    ]


def numerics_speed(figures: dict[str, Any]) -> list[str]:
    """Returns the table of `numerics_speed.py`."""
    lines = ["| 100 million float32 weights | seconds | peak MiB beyond the input |", "|---|--:|--:|"]
    return lines + [f"| {name} | {case['seconds']:.1f} | {case['peak_mib']:.0f} |" for name, case in figures["cases"].items()]


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "share_8bit": share_8bit,
    "share_8bit_stripped": share_8bit,
    "session_start": session_start,
    "large_model": large_model,
    "numerics_speed": numerics_speed,
}


def updated(readme: str) -> str:
    """Returns the README with every table written anew."""
    for name, render in TABLES.items():
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        table = "\n".join(render(json.loads(path.read_text())))
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        readme = re.sub(pattern, lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", readme, flags=re.DOTALL)
    return readme


def main() -> int:
    """Rewrites or checks README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the README is out of date")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = updated(before)
    if not arguments.check:
        path.write_text(after, encoding="utf-8")
    return int(arguments.check and before != after)


if __name__ == "__main__":
    sys.exit(main())
