"""What coding symbols in pairs, or as runs of zeros and values, would save over coding them singly: Huffman bytes of real weights.

    python benchmarks/token_forms.py --json benchmarks/results/token_forms.json

Codes are those of ``share-weights:step=S`` without calibration data, S in rms of each channel; bytes are streams and tables of
`onnxshrink.numerics.tokens`, tensor by tensor, in the cheaper form. The graph decoder knows single symbols and runs.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import corpus

from onnxshrink.contract import Context
from onnxshrink.graph.coded import coded_weights
from onnxshrink.graph.files import load
from onnxshrink.graph.huffman_weights import centred
from onnxshrink.numerics.tokens import forms
from onnxshrink.passes.share_weights import ShareWeights

_MODELS = ("cifar_resnet20", "squeezenet_fp32up", "ppocrv4_rec", "silero_vad", "gtcrn")
_STEPS = (0.25, 0.5, 1.0, 2.0)


def measure(name: str, step: float) -> dict[str, Any]:
    """Returns the bytes of all coded weights of a model, by the forms that may be chosen from."""
    graph = load(corpus.model_path(name))
    ShareWeights(step=step, per="channel", method="uniform").apply(graph, Context())
    totals: Counter[str] = Counter()
    weights = 0
    for item in coded_weights(graph):
        weight = centred(item)
        if weight is None:
            continue
        codes = weight.codes.reshape(-1).view("uint8")
        found = forms(codes, 0)
        weights += codes.size
        totals["single"] += found["single"]
        totals["single or runs"] += min(found[kind] for kind in ("single", "runs") if kind in found)
        totals["any"] += min(found.values())
    return {"name": name, "step": step, "weights": weights, **totals}


def main() -> None:
    """Measures all models at all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    rows = []
    for name in _MODELS:
        for step in _STEPS:
            row = measure(name, step)
            rows.append(row)
            pairs = 1 - row["any"] / row["single or runs"]
            bits = 8 * row["single or runs"] / row["weights"]
            print(f"{name:20} step {step:<5g} {bits:.2f} bits a weight; pairs would save another {pairs:.2%}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
