"""How a result is judged: its outputs on evaluation inputs against the original's, and what making it took."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import corpus
import numpy as np

from onnxshrink.contract import Context, Pass, Report
from onnxshrink.graph.ir import Graph
from onnxshrink.validate import Comparison


@dataclass(frozen=True, kw_only=True)
class Snapshot(Pass):
    """Changes nothing; keeps a copy of the graph as it is between two passes."""

    name: ClassVar[str] = "snapshot"
    taken: ClassVar[list[Graph]] = []

    def apply(self, graph: Graph, context: Context) -> Report:
        """Keeps a copy."""
        self.taken.append(graph.copy())
        return Report()


def peak_kb() -> int:
    """Returns the most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def quality(comparison: Comparison) -> dict[str, Any]:
    """Returns SQNR of the worst output, agreement, and top-1 of original and result where there are labels."""
    worst, agreed, accuracy = comparison.worst("sqnr_db"), comparison.worst("agreement"), comparison.accuracy
    return {
        "sqnr_db": worst.sqnr_db if worst else None,
        "agreement": agreed.agreement if agreed else None,
        "accuracy": [accuracy.top1_original, accuracy.top1_candidate] if accuracy else None,
        "samples": comparison.samples,
        "failure": comparison.failure,
    }


def spearman(path: Path) -> float:
    """Returns the rank correlation of MiniLM's cosines with the scores of people, over all sentence pairs."""
    import onnxruntime
    from scipy.stats import spearmanr

    running = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with np.load(corpus.CORPUS / "minilm_l6_v2" / "stsb_dev.npz") as data:
        left, right = (
            [embedding(running, *pair) for pair in zip(data[f"ids_{s}"], data[f"mask_{s}"], strict=True)] for s in "ab"
        )
        return float(spearmanr([one @ other for one, other in zip(left, right, strict=True)], data["score"]).statistic)


def embedding(running: Any, ids: Any, mask: Any) -> Any:
    """Returns the mean of a sentence's last hidden state, of length 1."""
    length = int(mask.sum())
    feeds = {"input_ids": ids[None, :length], "attention_mask": mask[None, :length]}
    (hidden,) = running.run(["last_hidden_state"], {**feeds, "token_type_ids": np.zeros_like(feeds["input_ids"])})
    mean = hidden[0].mean(axis=0)
    return mean / np.linalg.norm(mean)
