"""Channels removed from real models: what is left of work, bytes and time, and what it does to the outputs on evaluation inputs.

    python benchmarks/channels.py --models narrow --json benchmarks/results/channels.json
    python benchmarks/channels.py --only cifar_resnet20 --setting macs=0.75,round=none
    python benchmarks/channels.py --models narrow --latency --json benchmarks/results/channels.json   # of what is there

A row is ``onnxshrink compress --pass tidy --pass remove-channels:SETTING`` from all calibration inputs. ``paid`` in the README is the
share of the saved work that became saved time. See `harness.py` for the options.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import corpus
from harness import run_rows
from judged import Snapshot, peak_kb, quality, spearman

from onnxshrink import api
from onnxshrink.graph.files import load
from onnxshrink.recipe import parse_pass
from onnxshrink.report import in_general
from onnxshrink.runtime import session
from onnxshrink.synthetic import synthetic_samples
from onnxshrink.trials import SampleTrials

PLAIN = "criterion=l2,scope=local,repair=false"
HEADLINES = {
    "cifar_resnet20": [f"macs=0.75,round=none,{PLAIN}", "macs=0.75,round=none", "macs=0.75,round=4", "macs=0.75"],
    "squeezenet_fp32up": [f"macs=0.9,{PLAIN}", "macs=0.9", "macs=0.8", "macs=0.8,round=none"],
    "mobilenetv2_tflq_deq": [f"macs=0.9,{PLAIN}", "macs=0.9", "macs=0.8", "macs=0.8,round=none"],
    "minilm_l6_v2": [f"macs=0.8,{PLAIN}", "macs=0.8"],
}
OTHERS = [
    *("yolox_nano", "ppocrv4_det", "ppocrv4_rec", "ultraface_rfb_320_simplified", "fsanet_1x1", "subpixel_cnn", "fns_candy"),
    *("oww_embedding", "gtcrn", "dtln_1", "silero_vad", "silero_vad_16k_op15", "silero_vad_op18_ifless", "ppocrv2_cls"),
    *("cifar_resnet32_dynamo", "basic_pitch_nmp", "magika_v3_3", "mnist_cntk", "squeezenet_fp16"),
]


def rows() -> list[tuple[str, str]]:
    """Returns (model, setting) of all rows."""
    return [(name, setting) for name, settings in HEADLINES.items() for setting in settings] + [(name, "macs=0.8") for name in OTHERS]


def measure(name: str, setting: str, path: Path) -> dict[str, Any]:
    """Returns the figures of one model at one setting, and leaves the result at a path."""
    idle = peak_kb()
    steps = [parse_pass("tidy"), Snapshot(), parse_pass(f"remove-channels:{setting}")]
    validation = corpus.evaluation(name)  # without a limit nothing depends on it
    result = api.compress(corpus.model_path(name), steps, calibration=corpus.calibration(name), validation=validation)
    step, before = result.report.passes[2], Snapshot.taken[0]
    result.save(path)
    row: dict[str, Any] = {
        "name": name,
        "setting": setting,
        "seconds": step.seconds,
        "peak_mb": (peak_kb() - idle) / 1024,
        "outcome": f"{step.outcome} {step.reason}".strip(),
        "notes": list(step.notes),
        "kept": dict(Counter(in_general(skip.reason) for skip in step.skips).most_common()),
        "bytes_before": result.report.bytes_before,
        "bytes": result.report.bytes_after,
    }
    graph = load(path)
    with session(before) as running:
        trials = SampleTrials(synthetic_samples(before, running, 1))
    row |= {"macs": sum(trials.macs(graph).values()) / sum(trials.macs(before).values())}
    row |= {"params": sum(constant.size for constant in graph.constants) / sum(constant.size for constant in before.constants)}
    row |= quality(api.verify(corpus.model_path(name), path, inputs=validation).comparison)
    if name == "minilm_l6_v2":
        row["spearman"] = [spearman(corpus.model_path(name)), spearman(path)]
    return row


def describe(row: dict[str, Any]) -> str:
    """Returns one line about a row."""
    accuracy = "" if row["accuracy"] is None else f"  top-1 {row['accuracy'][0]:.2%} → {row['accuracy'][1]:.2%}"
    ranks = "" if "spearman" not in row else "  Spearman " + " → ".join(f"{rank:.4f}" for rank in row["spearman"])
    sqnr = "no SQNR" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB"
    latency = f"  time x {row['latency']:.3f}" if "latency" in row else ""
    return (
        f"MACs x {row['macs']:.3f}{latency}  params x {row['params']:.3f}  {sqnr}{accuracy}{ranks}"
        f"  {row['bytes_before']:,} → {row['bytes']:,}  {row['seconds']:.0f} s, {row['peak_mb']:.0f} MB"
    )


if __name__ == "__main__":
    run_rows(__doc__, rows(), measure, describe)
