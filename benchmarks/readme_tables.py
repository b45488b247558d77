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

import numpy as np

from onnxshrink.report import format_share

ROOT = Path(__file__).resolve().parents[1]
_UNCUT = 0.999


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


def coded_size(figures: dict[str, Any]) -> list[str]:
    """Returns what the rows of `coded_size.py` weigh, and how near they stay to the originals."""
    lines = [
        "| model | bytes | `share-weights` | plain codes | Huffman | plain, zipped | Huffman, zipped | SQNR dB | judged by |",
        "|---|--:|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in figures["models"]:
        if "error" in row:
            lines.append(f"| {row['name']} | | {row['asked']} | {row['error']} ||||||")
            continue
        sizes = " | ".join(f"{row[key]:,}" for key in ("plain_bytes", "bytes", "plain_bytes_zipped", "bytes_zipped"))
        lines.append(
            f"| {row['name']} | {row['bytes_before']:,} | {row['share']} | {sizes} | {row['sqnr_db']:.1f} | {_judged(row)} |"
        )
    return lines


def _judged(row: dict[str, Any]) -> str:
    """Returns what else than SQNR was measured."""
    parts = []
    if row["agreement"] is not None:
        parts.append(f"agreement {format_share(row['agreement'])}")
    if row["accuracy"] is not None:
        parts.append(f"top-1 {row['accuracy'][0]:.2%} → {row['accuracy'][1]:.2%}")
    if "spearman" in row:
        parts.append(f"Spearman {100 * row['spearman'][0]:.2f} → {100 * row['spearman'][1]:.2f}")
    return "; ".join(parts) or "–"


def coded_cost(figures: dict[str, Any]) -> list[str]:
    """Returns what the rows of `coded_size.py` cost: bits beyond the entropy, run time, start, and compression."""
    lines = [
        "| model | `share-weights` | entropy | coded | coded / entropy | run time / original's | session start ms | CPU s | peak MB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in figures["models"]:
        if "error" in row:
            continue
        run, start = "–", "–"
        if "run_ratio" in row:
            low, median, high = row["run_ratio"]
            run, start = f"{median:.2f} ({low:.2f} to {high:.2f})", " → ".join(f"{value:.0f}" for value in row["start_ms"])
        lines.append(
            f"| {row['name']} | {row['share']} | {row['entropy_bits']:.2f} | {row['coded_bits']:.2f} "
            f"| {row['coded_bits'] / row['entropy_bits']:.3f} | {run} | {start} | {row['cpu_seconds']:.0f} | {row['peak_mb']:.0f} |"
        )
    return lines


def huffman_session(figures: dict[str, Any]) -> list[str]:
    """Returns the table of `huffman_session.py`."""
    lines = [
        "| million weights | form | file MB | session start s | ns per weight beyond dense | peak MB | extra peak / dense weights |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in figures["forms"]:
        form = f"{row['form']}, `onnxshrink.load`" if row["way"] else row["form"]
        extra = "| – | " if row["form"] == "dense" else f"| {row['ns_per_weight']:.0f} | "
        share = "–" if row["form"] == "dense" else f"{row['extra_peak']:.2f}"
        lines.append(
            f"| {row['weights'] / 1e6:.0f} | {form} | {row['file_mb']:.1f} | {row['seconds']:.1f} {extra}{row['peak_mb']:.0f} | {share} |"
        )
    return lines


def sparsity(figures: dict[str, Any]) -> list[str]:
    """Returns the table of `sparsity.py`: a line for each model and share of zeros."""
    lines = [
        "| model | zeros | original | least of each layer | least of all | repaired | bytes | packed | 5-bit codes | s | MB |",
        "|---|---|---|---|---|---|--:|--:|---|--:|--:|",
    ]
    rows = {(row["name"], row["setting"]): row for row in figures["models"]}
    for (name, setting), row in rows.items():
        if "repair=false" in setting:
            continue
        if "error" in row:
            lines.append(f"| {name} | {setting} | {row['error']} |||||||||")
            continue
        others = [rows.get((name, f"{setting},repair=false,scope={scope},criterion=magnitude")) for scope in ("layer", "global")]
        cells = [_score(other, 1) if other is not None else "–" for other in others]
        zeros = setting.removeprefix("pattern=") if "pattern" in setting else f"{float(setting.partition('=')[2]):.0%}"
        shared = f"{row['shared_bytes']:,}: {_score({**row['shared'], 'spearman': row.get('spearman', [])[::2]}, 1)}"
        lines.append(
            f"| {name} | {zeros} | {_score(row, 0)} | {cells[0]} | {cells[1]} | {_score(row, 1)} | {row['bytes_before']:,} "
            f"| {row['packed_bytes']:,} | {shared} | {row['seconds']:.0f} | {row['peak_mb']:.0f} |"
        )
    return lines


def channels(figures: dict[str, Any]) -> list[str]:
    """Returns the table of `channels.py`."""
    lines = [
        "| model | asked | original | result | MACs | time | paid | params | bytes | s | MB |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in figures["models"]:
        asked = row["setting"].replace("criterion=l2,scope=local,repair=false", "plain").replace(",", ", ")
        if "error" in row:
            lines.append(f"| {row['name']} | {asked} | {row['error']} |||||||||")
            continue
        head = f"| {row['name']} | {asked} | {_score(row, 0)}"
        if row["macs"] > _UNCUT:
            lines.append(f"{head} | left as it was | 1.00 | | | | {row['bytes']:,} | {row['seconds']:.0f} | |")
            continue
        time = f"{row['latency']:.2f}" if "latency" in row else ""
        paid = f"{(1 - row['latency']) / (1 - row['macs']):.2f}" if "latency" in row else ""
        lines.append(
            f"{head} | {_score(row, 1)} | {row['macs']:.2f} | {time} | {paid} "
            f"| {row['params']:.2f} | {row['bytes']:,} | {row['seconds']:.0f} | {row['peak_mb']:.0f} |"
        )
    return lines


def low_rank(figures: dict[str, Any]) -> list[str]:
    """Returns the table of `low_rank.py`."""
    lines = [
        "| model | asked | original | plain SVD | whitened, repaired | params | MACs | time | bytes | s | MB |",
        "|---|---|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    rows = {(row["name"], row["setting"]): row for row in figures["models"]}
    for (name, setting), row in rows.items():
        if "whole" in setting or "repair=false" in setting:
            continue
        if "error" in row:
            lines.append(f"| {name} | {setting} | {row['error']} |||||||||")
            continue
        plain, same = rows.get((name, f"{setting},repair=false")), rows.get((name, "same ranks,repair=false"))
        plains = [_score(plain, 1)] * (plain is not None) + [f"at the same ranks {_score(same, 1)}" for same in [same] if same is not None]
        time = f"{row['latency']:.2f}" if "latency" in row else ""
        lines.append(
            f"| {name} | {setting} | {_score(row, 0)} | {'; '.join(plains) or '–'} | {_score(row, 1)} "
            f"| {row['params']:.2f} | {row['macs']:.2f} | {time} | {row['bytes']:,} | {row['seconds']:.0f} | {row['peak_mb']:.0f} |"
        )
    return lines


def low_rank_coded(figures: dict[str, Any]) -> list[str]:
    """Returns the bytes of coded factors of `low_rank.py` next to those of coded whole weights of the same SQNR."""
    lines = [
        "| model | asked | factors, 5 bits | whole, 5 bits | 4 bits | 3 bits | whole, that SQNR | factors over whole |",
        "|---|---|---|---|---|---|--:|--:|",
    ]
    rows = {(row["name"], row["setting"]): row for row in figures["models"] if "error" not in row}
    for (name, setting), row in rows.items():
        wholes = [rows[name, one] for bits in (5, 4, 3) if (name, one := f"whole,bits={bits}") in rows]
        if "whole" in setting or "repair=false" in setting or len(wholes) < 3:
            continue
        cells = [f"{one['shared_bytes']:,}: {_score(_coded(one), 1)}" for one in (row, *wholes)]
        least = min(one["shared"]["sqnr_db"] for one in wholes)
        wanted = max(row["shared"]["sqnr_db"], least)
        known = np.array(sorted((one["shared"]["sqnr_db"], np.log2(one["shared_bytes"])) for one in wholes))
        same = 2 ** np.interp(wanted, *known.T)
        below = "< " if row["shared"]["sqnr_db"] < least else ""
        over = f"{'> ' if below else ''}{row['shared_bytes'] / same:.2f}"
        lines.append(f"| {name} | {setting} | {' | '.join(cells)} | {below}{same:,.0f} | {over} |")
    return lines


def _coded(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of the coded file of a row."""
    return {**row["shared"], "spearman": row["spearman"][::2]} if "spearman" in row else row["shared"]


def factor_speed(figures: dict[str, Any]) -> list[str]:
    """Returns what whitened factors take, of `factor_speed.py`, next to the textbook's way."""
    lines = [
        "| matrix | rank | s | textbook, s | peak memory over the float32 matrix | textbook's | error of outputs | textbook's |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in figures["cases"].items():
        size, kind, share = name.split()
        if kind == "whitened" and share not in ("textbook", "spectrum"):
            other = figures["cases"][f"{size} whitened textbook"]
            lines.append(
                f"| {size} | {share} | {row['seconds']:.2f} | {other['seconds']:.2f} | {row['peak_of_float32']:.1f} "
                f"| {other['peak_of_float32']:.1f} | {row['output_error']:.4f} | {other['cut'][share]['output_error']:.4f} |"
            )
    return lines


def channel_coverage(figures: dict[str, Any]) -> list[str]:
    """Returns the table of `channel_coverage.py`."""
    lines = ["| model | groups | free | parameters in free groups | weights cut | ops without a rule |", "|---|--:|--:|--:|--:|---|"]
    for row in figures["models"]:
        barriers = ", ".join(f"{op} {count}" for op, count in row["barriers"].items() if ":" not in op) or "–"
        lines.append(f"| {row['name']} | {row['groups']} | {row['free']} | {row['in_free']:.0%} | {row['cut']} | {barriers} |")
    return lines


def _score(row: dict[str, Any], which: int) -> str:
    """Returns top-1 or Spearman of the original (0) or the result (1), where there is one, and the result's SQNR."""
    if "error" in row:
        return str(row["error"])
    parts = []
    if row["accuracy"] is not None:
        parts.append(f"{row['accuracy'][which]:.2%}")
    elif row.get("spearman"):
        parts.append(f"{100 * row['spearman'][which]:.2f}")
    if which and row["sqnr_db"] is not None:
        parts.append("exact" if row["sqnr_db"] >= 300 else f"{row['sqnr_db']:.1f} dB")
    return ", ".join(parts) or "–"


def sparse_forms(figures: dict[str, Any]) -> list[str]:
    """Returns the bytes of each form of `sparse_forms.py` over those of the dense tensor."""
    forms = list(dict.fromkeys(row["form"] for row in figures["forms"] if row["form"] != "dense"))
    lines = [f"| zeros | {' | '.join(f'`{form}`' if '_' in form else form for form in forms)} |", "|---" + "|--:" * len(forms) + "|"]
    share = {(row["zeros"], row["form"]): row["of_dense"] for row in figures["forms"]}
    for zeros in dict.fromkeys(row["zeros"] for row in figures["forms"]):
        label = zeros if ":" in zeros else f"{float(zeros):.0%}"
        cells = [f"{share[zeros, form]:.3f}" if (zeros, form) in share else "–" for form in forms]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def prune_methods(figures: dict[str, Any]) -> list[str]:
    """Returns the output errors that `prune_speed.py` measured, by method."""
    methods = list(next(iter(next(iter(figures["methods"].values())).values())))
    lines = [f"| layers | zeros | {' | '.join(methods)} |", "|---|---" + "|--:" * len(methods) + "|"]
    for layers, settings in figures["methods"].items():
        for setting, errors in settings.items():
            lines.append(f"| {layers} | {setting} | {' | '.join(f'{errors[method]:.1f}' for method in methods)} |")
    return lines


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "coded_size": ("coded_size", coded_size),
    "coded_cost": ("coded_size", coded_cost),
    "sparsity": ("sparsity", sparsity),
    "sparse_forms": ("sparse_forms", sparse_forms),
    "channels": ("channels", channels),
    "low_rank": ("low_rank", low_rank),
    "low_rank_coded": ("low_rank", low_rank_coded),
    "factor_speed": ("factor_speed", factor_speed),
    "channel_coverage": ("channel_coverage", channel_coverage),
    "prune_methods": ("prune_speed", prune_methods),
    "huffman_session": ("huffman_session", huffman_session),
    "share_8bit": ("share_8bit", share_8bit),
    "share_8bit_stripped": ("share_8bit_stripped", share_8bit),
    "session_start": ("session_start", session_start),
    "large_model": ("large_model", large_model),
    "numerics_speed": ("numerics_speed", numerics_speed),
}
"""Name of the table in the README -> (name of the JSON file, what renders it)."""


def updated(readme: str) -> str:
    """Returns the README with every table written anew."""
    for name, (source, render) in TABLES.items():
        path = ROOT / "benchmarks" / "results" / f"{source}.json"
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
