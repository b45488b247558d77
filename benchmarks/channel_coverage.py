"""Which groups of channels real models have, how many can be cut, what stands in the way of others, and how many weights get narrower.

    python benchmarks/channel_coverage.py --json benchmarks/results/channel_coverage.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import corpus

from onnxshrink.contract import Context
from onnxshrink.graph.channel_groups import find_channels
from onnxshrink.graph.channel_rules import ruled_ops
from onnxshrink.graph.files import load
from onnxshrink.inputs import read_inputs
from onnxshrink.narrowing import known_shapes
from onnxshrink.passes.remove_channels import RemoveChannels
from onnxshrink.passes.tidy import Tidy
from onnxshrink.report import in_general
from onnxshrink.runtime import session
from onnxshrink.trials import SampleTrials


def coverage() -> dict[str, Any]:
    """Returns which models have groups that can be cut, what stands in the way elsewhere, and in how many a cut was made."""
    found: dict[str, Any] = {"ops": len(ruled_ops()), "models": []}
    for name in corpus.names():
        graph = load(corpus.model_path(name))
        Tidy().apply(graph, Context())
        with session(graph) as running:
            context = Context(trials=SampleTrials(read_inputs(corpus.calibration(name), running.inputs)))
        channels = find_channels(graph, known_shapes(graph, context))
        free = [group for group in channels.groups if group.reason is None]
        in_free = {id(member.tensor): member.tensor.size for group in free for member in group.weights}  # type: ignore[union-attr]
        every = sum(constant.size for constant in graph.constants)
        reasons = Counter(in_general(group.reason.text) for group in channels.groups if group.reason is not None)
        report = RemoveChannels(macs=0.9, round="none").apply(graph, context)
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


def main() -> None:
    """Looks at every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    found = coverage()
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
