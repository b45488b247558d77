"""Channels removed from real models: what is left of work, bytes and time, and what it does to the outputs on evaluation inputs.

    python benchmarks/channels.py --models /tmp/narrow --json benchmarks/results/channels.json
    python benchmarks/channels.py --only cifar_resnet20 --setting macs=0.75,round=none
    python benchmarks/channels.py --models /tmp/narrow --latency --json benchmarks/results/channels.json   # of what is there
    python benchmarks/channels.py --coverage --json benchmarks/results/channel_coverage.json

A row is ``onnxshrink compress --pass tidy --pass remove-channels:SETTING`` from all calibration inputs, in a process of its own, so that
its peak memory is its own. Latency is measured on one thread, original and result in turns on the same inputs, on a quiet machine.
``paid`` is the share of the saved work that became saved time. Rows that are in the JSON file already and are not asked for stay.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import corpus
from judged import Snapshot, peak_kb, quality, spearman

from onnxshrink import api
from onnxshrink.contract import Context
from onnxshrink.graph.channel_groups import find_channels
from onnxshrink.graph.channel_rules import ruled_ops
from onnxshrink.graph.files import load
from onnxshrink.passes.remove_channels import RemoveChannels
from onnxshrink.passes.tidy import Tidy
from onnxshrink.recipe import parse_pass
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
_SECONDS = 10.0


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
        "kept": dict(Counter(_general(skip.reason) for skip in step.skips).most_common()),
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


def _general(reason: str) -> str:
    """Returns a reason without what it names and counts."""
    return re.sub(r"\d+", "N", re.sub(r" ?\('[^']*'\)", "", reason))


def timed(name: str, path: Path) -> dict[str, Any]:
    """Returns the latency of a result next to its original's."""
    found = api.bench(corpus.model_path(name), path, inputs=corpus.calibration(name), seconds=_SECONDS)
    ratio = found.ratio
    return {"latency": ratio.median, "latency_low": ratio.low, "latency_high": ratio.high, "original_ms": found.a_ms.median}


def coverage() -> dict[str, Any]:
    """Returns which models have groups that can be cut, what stands in the way elsewhere, and in how many a cut was made."""
    found: dict[str, Any] = {"ops": len(ruled_ops()), "models": []}
    for name in corpus.names():
        graph = load(corpus.model_path(name))
        Tidy().apply(graph, Context())
        channels = find_channels(graph)
        free = [group for group in channels.groups if group.reason is None]
        in_free = {id(member.tensor): member.tensor.size for group in free for member in group.weights}  # type: ignore[union-attr]
        every = sum(constant.size for constant in graph.constants)
        reasons = Counter(_general(group.reason.text) for group in channels.groups if group.reason is not None)
        report = RemoveChannels(macs=0.9, round="none").apply(graph, Context())
        found["models"].append(
            {
                "name": name,
                "groups": len(channels.groups),
                "free": len(free),
                "in_free": sum(in_free.values()) / max(every, 1),
                "cut": len(report.changes),
                "barriers": dict(channels.barriers),
                "pinned": dict(reasons.most_common()),
            }
        )
        print(found["models"][-1], flush=True)
    return found


def measured(name: str, setting: str, path: Path) -> dict[str, Any]:
    """Returns a row, made in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps([name, setting, str(path)])]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        reason = [f"exit code {run.returncode}", *run.stderr.strip().splitlines()][-1]
        return {"name": name, "setting": setting, "error": reason[-300:]}
    row: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return row


def describe(row: dict[str, Any]) -> str:
    """Returns one line about a row."""
    head = f"{row['name']:22} {row['setting']:56}"
    if "error" in row:
        return f"{head} {row['error']}"
    accuracy = "" if row["accuracy"] is None else f"  top-1 {row['accuracy'][0]:.2%} → {row['accuracy'][1]:.2%}"
    ranks = "" if "spearman" not in row else "  Spearman " + " → ".join(f"{rank:.4f}" for rank in row["spearman"])
    sqnr = "no SQNR" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB"
    latency = f"  time x {row['latency']:.3f}" if "latency" in row else ""
    return (
        f"{head} MACs x {row['macs']:.3f}{latency}  params x {row['params']:.3f}  {sqnr}{accuracy}{ranks}"
        f"  {row['bytes_before']:,} → {row['bytes']:,}  {row['seconds']:.0f} s, {row['peak_mb']:.0f} MB"
    )


def main() -> None:
    """Runs the rows one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--setting", nargs="*", help="options of remove-channels, instead of the rows' own")
    parser.add_argument("--models", type=Path, default=Path("narrow"), help="folder for the results")
    parser.add_argument("--latency", action="store_true", help="measure the latency of the results that are there")
    parser.add_argument("--coverage", action="store_true", help="which models can be cut at all, and what stands in the way")
    parser.add_argument("--json", type=Path, help="where the figures go after each row")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, setting, path = json.loads(arguments.one)
        print(json.dumps(measure(name, setting, Path(path))))
        return
    if arguments.coverage:
        found = coverage()
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        return
    every = rows()
    chosen = [row for row in every if not arguments.only or row[0] in arguments.only]
    if arguments.setting:
        names = dict.fromkeys(name for name, _ in chosen)
        chosen = [(name, setting) for name in names for setting in arguments.setting]
    known: dict[tuple[str, str], dict[str, Any]] = {}
    if arguments.json and arguments.json.exists():
        known = {(row["name"], row["setting"]): row for row in json.loads(arguments.json.read_text())["models"]}
    order = {row: number for number, row in enumerate(every)}
    arguments.models.mkdir(parents=True, exist_ok=True)
    for name, setting in chosen:
        path = arguments.models / f"{name} {setting}.onnx"
        if arguments.latency:
            if not path.exists() or (name, setting) not in known:
                continue
            known[name, setting] |= timed(name, path)
        else:
            known[name, setting] = measured(name, setting, path)
        print(describe(known[name, setting]), flush=True)
        if arguments.json:
            ordered = sorted(known, key=lambda row: (order.get(row, len(order)), row))
            arguments.json.write_text(json.dumps({"models": [known[row] for row in ordered]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
