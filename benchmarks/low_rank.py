"""Weights of real models in thin pieces: parameters, work, bytes, and what it does to the outputs on evaluation inputs.

    python benchmarks/low_rank.py --models thin --json benchmarks/results/low_rank.json
    python benchmarks/low_rank.py --only minilm_l6_v2 --setting params=0.8
    python benchmarks/low_rank.py --models thin --latency --json benchmarks/results/low_rank.json   # of what is there

A row is ``onnxshrink compress --pass tidy --pass low-rank:SETTING`` from all calibration inputs; with ``repair=false`` weights
change least, without, outputs, and ``same ranks,repair=false`` is plain SVD at the ranks that the budget has given the whitened ones.
``shared`` is the file that the same pass, ``share-weights:bits=5``, ``huffman:raise-opset=true`` and ``shorten-names`` give. A setting of
``whole,bits=N`` leaves low-rank out and shares weights by N bits, to compare with. See `harness.py` for the options.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpus
from harness import run_rows
from judged import Snapshot, peak_kb, quality, spearman

from onnxshrink import api
from onnxshrink.contract import Pass, Rule, Step
from onnxshrink.graph.edit import sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.recipe import parse_pass
from onnxshrink.runtime import session
from onnxshrink.synthetic import synthetic_samples
from onnxshrink.trials import SampleTrials

BY_WORK = ("cifar_resnet20", "squeezenet_fp32up")
BY_PARAMETERS = ("minilm_l6_v2", "magika_v3_3", "oww_embedding", "dtln_1", "ppocrv4_rec", "basic_pitch_nmp")
CODING = ("share-weights:bits={}", "huffman:raise-opset=true", "shorten-names")
WHOLE = ("whole,bits=5", "whole,bits=4", "whole,bits=3")
SAME_RANKS = "same ranks,repair=false"


def rows() -> list[tuple[str, str]]:
    """Returns (model, setting) of all rows: plain SVD, whitened, and the model as it is."""
    found = []
    for names, setting in ((BY_PARAMETERS, "params=0.8"), (BY_WORK, "macs=0.8")):
        found += [(name, one) for name in names for one in (f"{setting},repair=false", setting, *WHOLE)]
    return [*found, ("minilm_l6_v2", SAME_RANKS)]


def measure(name: str, setting: str, path: Path) -> dict[str, Any]:
    """Returns the figures of one model at one setting, and leaves the result at a path."""
    idle, bits = peak_kb(), setting.removeprefix("whole,bits=") if setting in WHOLE else "5"
    cut: list[Pass | Step] = [] if setting in WHOLE else [_same_ranks(name) if setting == SAME_RANKS else parse_pass(f"low-rank:{setting}")]
    result = _compress(name, [parse_pass("tidy"), Snapshot(), *cut, Snapshot()])
    peak = peak_kb()
    before, after = Snapshot.taken
    sort_nodes(after)
    path.write_bytes(to_model(after).SerializeToString())
    step = result.report.passes[2]
    row: dict[str, Any] = {
        "name": name,
        "setting": setting,
        "seconds": step.seconds,
        "peak_mb": (peak - idle) / 1024,
        "outcome": f"{step.outcome} {step.reason}".strip(),
        "notes": [*step.notes, step.missed],
        "changes": [f"{change.site}: {change.detail}" for change in step.changes],
        "bytes_before": result.report.bytes_before,
        "bytes": path.stat().st_size,
    }
    with session(before) as running:
        trials = SampleTrials(synthetic_samples(before, running, 1))
    work = [sum((trials.macs(graph) or {}).values()) for graph in (after, before)]
    row |= {"macs": work[0] / work[1]}
    row |= {"params": sum(constant.size for constant in after.constants) / sum(constant.size for constant in before.constants)}
    validation = corpus.evaluation(name)
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) / "shared.onnx"
        _compress(name, [parse_pass("tidy"), *cut, *(parse_pass(text.format(bits)) for text in CODING)]).save(shared)
        row |= {"shared_bytes": shared.stat().st_size}
        row |= quality(api.verify(corpus.model_path(name), path, inputs=validation).comparison)
        row["shared"] = quality(api.verify(corpus.model_path(name), shared, inputs=validation).comparison)
        if name == "minilm_l6_v2":
            row["spearman"] = [spearman(one) for one in (corpus.model_path(name), path, shared)]
    return row


def _compress(name: str, steps: Sequence[Pass | Step]) -> api.Compressed:
    """Returns what passes make of a model, from all calibration inputs: evaluation inputs judge, and without a limit change nothing."""
    return api.compress(corpus.model_path(name), steps, calibration=corpus.calibration(name), validation=corpus.evaluation(name))


def _same_ranks(name: str) -> Step:
    """Returns plain SVD at the ranks that a budget has given: products only."""
    done = _compress(name, [parse_pass("tidy"), parse_pass("low-rank:params=0.8")]).report.passes[1]
    ranks = {change.site: int(re.findall(r"rank (\d+) of", change.detail)[0]) for change in done.changes}
    rules = [Rule("*", skip=True), *(Rule(site, {"rank": rank}, skip=False) for site, rank in ranks.items())]
    return Step(parse_pass("low-rank:params=0.8,repair=false"), rules)


def describe(row: dict[str, Any]) -> str:
    """Returns one line about a row."""
    accuracy = "" if row["accuracy"] is None else f"  top-1 {row['accuracy'][0]:.2%} → {row['accuracy'][1]:.2%}"
    ranks = "" if "spearman" not in row else "  Spearman " + " → ".join(f"{rank:.4f}" for rank in row["spearman"])
    latency = f"  time x {row['latency']:.3f}" if "latency" in row else ""
    return (
        f"params x {row['params']:.3f}  MACs x {row['macs']:.3f}{latency}  {row['sqnr_db']:.1f} dB{accuracy}{ranks}"
        f"  {row['bytes_before']:,} → {row['bytes']:,}, shared {row['shared_bytes']:,} {row['shared']['sqnr_db']:.1f} dB"
        f"  {row['seconds']:.0f} s, {row['peak_mb']:.0f} MB"
    )


if __name__ == "__main__":
    run_rows(__doc__, rows(), measure, describe)
