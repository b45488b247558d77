"""Huffman coding on twenty million symbols: symbols a second, coded bits, and peak memory beyond the input.

    OMP_NUM_THREADS=1 python benchmarks/huffman_speed.py --json benchmarks/results/huffman_speed.json
    python benchmarks/huffman_speed.py --size 5000000 --only "40 symbols"

Each case runs in a process of its own, so that the peak memory is its own; it includes what the case returns. Speeds are those
of the best of several runs, on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from onnxshrink.numerics.huffman import code_lengths, coded_bits, decode, encode, entropy_bits
from onnxshrink.numerics.tokens import KINDS, detokenise, forms, tokenise

Array = np.ndarray[Any, np.dtype[Any]]
_MEBI = 1 << 20
_PIECE = 1 << 16  # what is made before measuring is made in such pieces: it must not be the peak

SOURCES: dict[str, tuple[int, float]] = {  # alphabet, standard deviation of normals that are rounded
    "40 symbols, 4.4 bits": (40, 5.0),
    "40 symbols, 1.5 bits": (40, 0.6),
    "256 symbols, 7 bits": (256, 30.0),
    "1,500 symbols, 8.7 bits": (1500, 100.0),
    "4,096 symbols, 10.7 bits": (4096, 400.0),
    "65,536 symbols, 14.7 bits": (65_536, 6000.0),
}


def main() -> None:
    """Runs the cases that are asked for and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=20_000_000, help="how many symbols")
    parser.add_argument("--lane-bytes", type=int, default=64, help="bytes a lane")
    parser.add_argument("--repeat", type=int, default=5, help="runs, of which the best counts")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--case", choices=[*CASES], help=argparse.SUPPRESS)  # how it calls itself
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(CASES[arguments.case](arguments)))
        return
    results = {}
    for name in (name for name in CASES if arguments.only in name):
        options = {
            "--case": name,
            "--size": arguments.size,
            "--lane-bytes": arguments.lane_bytes,
            "--repeat": arguments.repeat,
        }
        command = [sys.executable, __file__, *(str(part) for option in options.items() for part in option)]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        results[name] = json.loads(answer.stdout)
        print(f"{name:36s}" + "  ".join(f"{key} {value:,}" for key, value in results[name].items()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": _machine(arguments), "cases": results}, indent=1) + "\n")


def _coding(source: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Returns the speeds and sizes of coding single symbols."""
    symbols = _symbols(source, arguments.size)
    counts = np.zeros(SOURCES[source][0], np.int64)
    for start in range(0, symbols.size, _PIECE):
        counts += np.bincount(symbols[start : start + _PIECE], minlength=counts.size)
    lengths = code_lengths(counts, 20 if counts.size > 1 << 12 else 15)
    before = _peak_bytes()
    encoding, lanes = _best(lambda: encode(symbols, lengths, arguments.lane_bytes), arguments.repeat)
    between = _peak_bytes()
    decoding, decoded = _best(lambda: decode(lanes, lengths, symbols.size), arguments.repeat)
    if not np.array_equal(decoded, symbols):
        raise ValueError("decoding does not invert encoding")
    return {
        "encoded_millions_per_second": round(symbols.size / encoding / 1e6, 1),
        "decoded_millions_per_second": round(symbols.size / decoding / 1e6, 1),
        "entropy_bits": round(entropy_bits(counts) / symbols.size, 4),
        "codeword_bits": round(coded_bits(counts, lengths) / symbols.size, 4),
        "lane_bits": round(8 * lanes.size / symbols.size, 4),
        "encoding_peak_mib": round((between - before) / _MEBI, 1),
        "decoding_peak_mib": round((_peak_bytes() - between) / _MEBI, 1),
    }


def _tokens(source: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Returns the speeds and sizes of each kind of tokens."""
    codes = _symbols(source, arguments.size)
    zero = SOURCES[source][0] // 2
    seconds, sizes = _best(lambda: forms(codes, zero), arguments.repeat)
    results = {"compared_millions_per_second": round(codes.size / seconds / 1e6, 1)}
    for kind in (kind for kind in KINDS if kind in sizes):
        making, tokens = _best(lambda kind=kind: tokenise(codes, kind, zero), arguments.repeat)  # type: ignore[misc]
        reading, decoded = _best(lambda tokens=tokens: detokenise(tokens.tokens, tokens, codes.size), arguments.repeat)  # type: ignore[misc]
        if not np.array_equal(decoded, codes):
            raise ValueError("tokens do not give the codes back")
        results[f"{kind}_bits"] = round(8 * sizes[kind] / codes.size, 4)
        results[f"{kind}_made_millions_per_second"] = round(codes.size / making / 1e6, 1)
        results[f"{kind}_read_millions_per_second"] = round(codes.size / reading / 1e6, 1)
    return results


def _lengths(arguments: argparse.Namespace) -> dict[str, float]:
    """Returns the seconds that 65,536 code lengths take."""
    counts = (1e9 / np.arange(1, 65_537)).astype(np.int64)
    return {"seconds": round(_best(lambda: code_lengths(counts, 24), arguments.repeat)[0], 4)}


CASES: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    **{source: lambda arguments, source=source: _coding(source, arguments) for source in SOURCES},  # type: ignore[misc]
    "tokens of 40 symbols, 4.4 bits": lambda arguments: _tokens("40 symbols, 4.4 bits", arguments),
    "tokens of 40 symbols, 1.5 bits": lambda arguments: _tokens("40 symbols, 1.5 bits", arguments),
    "code_lengths of 65,536 symbols": _lengths,
}


def _symbols(source: str, size: int) -> Array:
    alphabet, deviation = SOURCES[source]
    generator, symbols = np.random.default_rng(0), np.empty(size, np.uint8 if alphabet <= 256 else np.uint16)
    for start in range(0, size, _PIECE):
        piece = symbols[start : start + _PIECE]
        normals = generator.standard_normal(piece.size) * deviation + alphabet // 2
        piece[:] = np.clip(np.rint(normals), 0, alphabet - 1)
    symbols.flags.writeable = False
    return symbols


def _best(function: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """Returns the fewest seconds of some calls, and what the last returned."""
    seconds, answer = float("inf"), None
    for _ in range(repeat):
        answer, start = None, time.perf_counter()  # what the call before returned must not count as peak memory
        answer = function()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, answer


def _peak_bytes() -> int:
    """Returns the most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    sizes = {"symbols": arguments.size, "lane_bytes": arguments.lane_bytes}
    return {**sizes, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), **versions}


if __name__ == "__main__":
    main()
