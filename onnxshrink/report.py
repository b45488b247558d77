"""What was done to a model, what was left alone and why, and how far the outputs moved: for people and for machines."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from onnxshrink.contract import Change, Skip
from onnxshrink.metrics import OutputMetrics
from onnxshrink.validate import Accuracy, Tolerance

__all__ = [
    "CompressionReport",
    "Outcome",
    "PassReport",
    "format_bytes",
    "format_option",
    "format_share",
    "in_general",
    "output_row",
    "skip_counts",
]

Outcome = Literal["kept", "weakened", "unchanged", "dropped"]


@dataclass(frozen=True)
class PassReport:
    """One step of a compression.

    Attributes:
        name: of the pass.
        options: what it ran with in the end.
        outcome: kept as asked; weakened to stay within the tolerance; unchanged, because no site could be changed; or dropped.
        reason: why it was weakened or dropped, else empty.
        bytes_before: bytes of the model before the step.
        bytes_after: bytes of the model after it.
        seconds: wall-clock time, validation included.
        chosen: names of the options that differ from their defaults.
        changes: sites that were rewritten; empty when the pass was dropped.
        skips: sites that were left as they were.
        notes: what else is worth knowing.
        missed: which target of the pass's own was not reached, and what was; else empty.
        outputs: the outputs after this step, compared with the original's.
    """

    name: str
    options: dict[str, Any]
    outcome: Outcome
    reason: str
    bytes_before: int
    bytes_after: int
    seconds: float
    chosen: Sequence[str] = ()
    changes: Sequence[Change] = ()
    skips: Sequence[Skip] = ()
    notes: Sequence[str] = ()
    outputs: Sequence[OutputMetrics] = ()
    missed: str = ""


@dataclass(frozen=True)
class CompressionReport:
    """A whole compression.

    Attributes:
        model: how the original was named.
        bytes_before: bytes of the original, external data included.
        bytes_after: bytes of the result.
        tolerance: the limits that held after every pass.
        inputs: where validation inputs came from.
        validation_samples: how many inputs the outputs were compared on.
        calibration_samples: how many other inputs passes could use; disjoint from the former.
        synthetic: whether the inputs were made up, which proves less.
        seed: of all randomness.
        passes: in order.
        outputs: the result's outputs, compared with the original's.
        accuracy: of both models, where labels came with the inputs.
        metrics: the user's own measures by name.
        notes: warnings about the whole.
        versions: of the packages that matter.
    """

    model: str
    bytes_before: int
    bytes_after: int
    tolerance: Tolerance
    inputs: str
    validation_samples: int
    calibration_samples: int
    synthetic: bool
    seed: int
    passes: Sequence[PassReport]
    outputs: Sequence[OutputMetrics]
    accuracy: Accuracy | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """How many times smaller the result is."""
        return self.bytes_before / max(1, self.bytes_after)

    @property
    def target_reached(self) -> bool:
        """Whether every pass that was asked for was kept, if only weakened, and reached what it was to reach."""
        return all(step.outcome != "dropped" and not step.missed for step in self.passes)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain dicts, lists, strings and finite numbers."""
        return {"ratio": self.ratio, "target_reached": self.target_reached, **asdict(self)}

    def to_json(self) -> str:
        """Returns the report as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """Returns the report as Markdown, every change and skip included."""
        lines = [
            f"# {self.model}",
            "",
            f"{format_bytes(self.bytes_before)} → {format_bytes(self.bytes_after)} ({self.ratio:.2f}x smaller)",
            "",
            f"Validated on {self.validation_samples} inputs: {self.inputs}. Limits: {self.tolerance}.",
            "",
            *_table(
                ["output", "SQNR dB", "cosine", "max abs error", "agreement"],
                [output_row(output) for output in self.outputs],
            ),
            *(f"- {note}" for note in self.notes),
        ]
        for step in self.passes:
            options = ", ".join(f"{key.replace('_', '-')}={format_option(value)}" for key, value in step.options.items())
            lines += ["", f"## {step.name} ({options}): {step.outcome}", ""]
            lines += [line for text in (step.reason, step.missed) if text for line in (text, "")]
            lines += [f"{format_bytes(step.bytes_before)} → {format_bytes(step.bytes_after)} in {step.seconds:.1f} s", ""]
            lines += _table(
                ["site", "before", "after", "change"],
                [[c.site, str(c.bytes_before), str(c.bytes_after), c.detail] for c in step.changes],
            )
            lines += _table(["site", "left as it was, because"], [[skip.site, skip.reason] for skip in step.skips])
            lines += [f"- {note}" for note in step.notes]
        return "\n".join(lines) + "\n"


def format_bytes(count: int) -> str:
    """Returns a size for people, in decimal units.

    >>> format_bytes(830_000), format_bytes(12)
    ('830.0 KB', '12 B')
    """
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable: the last unit takes every size")


def skip_counts(skips: Sequence[Skip]) -> list[tuple[str, int, str]]:
    """Returns (reason, how often, first site) for each reason, most frequent first.

    Reasons that differ in numbers and names only are one; a reason that occurs once keeps its own.
    """
    first: dict[str, Skip] = {}
    for skip in skips:
        first.setdefault(in_general(skip.reason), skip)
    counts = Counter(in_general(skip.reason) for skip in skips)
    return [
        (reason if count > 1 else first[reason].reason, count, first[reason].site) for reason, count in counts.most_common()
    ]


def in_general(reason: str) -> str:
    """Returns a reason with an ellipsis for each number and each quoted name; digits at the end of a word are part of it.

    >>> in_general("would take 929 bytes as float32, dense it takes 151")
    'would take … bytes as float32, dense it takes …'
    >>> in_general("a graph output ('logits')")
    'a graph output'
    """
    unnamed = re.sub(r" ?\('[^']*'\)", "", reason)
    return re.sub(r"(?<![A-Za-z\d])\d[\d.,]*(?<![.,])", "…", re.sub(r"'[^']*'", "'…'", unnamed))


def format_share(share: float) -> str:
    """Returns a share as a percentage that says 100 % only of all.

    >>> format_share(0.975), format_share(0.9996), format_share(1.0)
    ('97.5%', '>99.9%', '100.0%')
    """
    text = f"{share:.1%}"
    return ">99.9%" if text == "100.0%" and share < 1 else text


def format_option(value: object) -> str:
    """Returns an option's value as the command line takes it; of a number that a search found, the digits that matter.

    >>> format_option(0.12013549804687501), format_option("2:4"), format_option(True), format_option(None)
    ('0.1201', '2:4', 'true', 'none')
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def output_row(output: OutputMetrics) -> list[str]:
    """Returns an output's name, SQNR, cosine, largest error and agreement for people; equal outputs have no SQNR."""
    sqnr = "equal" if output.max_abs == 0 and output.drift == 0 else f"{output.sqnr_db:.1f}"
    agreement = "–" if output.agreement is None else format_share(output.agreement)
    return [output.name, sqnr, f"{output.cosine:.6f}", f"{output.max_abs:.3g}", agreement]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Returns a Markdown table, or nothing for no rows; a pipe within a cell is escaped."""
    if not rows:
        return []
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *escaped]] + [""]
