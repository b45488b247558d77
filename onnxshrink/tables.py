"""Reports as tables in a terminal; every function returns something rich can print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from onnxshrink.report import (
    CompressionReport,
    PassReport,
    format_bytes,
    format_option,
    format_share,
    in_general,
    output_row,
    skip_counts,
)
from onnxshrink.validate import Tolerance

if TYPE_CHECKING:
    from onnxshrink.api import Expanded, Verification
    from onnxshrink.degradation import Degradation, ModelCurve, ModelPoint
    from onnxshrink.demo import DemoResult
    from onnxshrink.group_inspection import GroupInfo
    from onnxshrink.inspection import Inspection, WeightInfo
    from onnxshrink.latency import LatencyReport
    from onnxshrink.metrics import OutputMetrics
    from onnxshrink.rank_inspection import RankInfo
    from onnxshrink.registry import PassInfo
    from onnxshrink.validate import Accuracy

__all__ = [
    "accuracy",
    "channel_groups",
    "compression",
    "demo",
    "expansion",
    "inspection",
    "latency",
    "outputs",
    "passes",
    "ranks",
    "sensitivity",
    "verification",
]

_STYLES = {"kept": "green", "weakened": "yellow", "unchanged": "dim", "dropped": "red"}
_MOST_SKIPS = 6
_MOST_WEIGHTS = 40
_LONGEST_SITE, _LONGEST_LAYER = 30, 27  # the end of a long name tells more than its beginning


def compression(report: CompressionReport, places: str = "") -> RenderableType:
    """Returns what was done, pass by pass, how the outputs compare, and what to know besides."""
    steps = _table("pass", "outcome", "changed", "left", ">size", ">seconds")
    for step in report.passes:
        outcome = f"[{_STYLES[step.outcome]}]{step.outcome}[/]"
        sizes = f"{format_bytes(step.bytes_before)} → {format_bytes(step.bytes_after)}"
        steps.add_row(
            escape(_title(step)), outcome, str(len(step.changes)), str(len(step.skips)), sizes, f"{step.seconds:.1f}"
        )
    size = f"\n[bold]{format_bytes(report.bytes_before)} → {format_bytes(report.bytes_after)}[/] ({report.ratio:.2f}x smaller)"
    size += f", written to {escape(places)}" if places else ""
    return Group(
        steps,
        *(f"[yellow]{escape(step.name)}: {escape(step.reason)}[/]" for step in report.passes if step.reason),
        *(f"[yellow]{escape(step.name)}: {escape(step.missed)}[/]" for step in report.passes if step.missed),
        *(part for step in report.passes for part in _skips(step)),
        *(f"[yellow]{escape(step.name)}: {escape(note)}[/]" for step in report.passes for note in step.notes),
        outputs(report.outputs, report.validation_samples, report.inputs, report.tolerance),
        *accuracy(report.accuracy),
        *(f"[yellow]note:[/] {escape(note)}" for note in report.notes),
        size,
    )


def outputs(metrics: Sequence[OutputMetrics], samples: int, source: str, tolerance: Tolerance) -> RenderableType:
    """Returns how far each output is from the original's."""
    limits = f"limits: {tolerance}" if tolerance.is_set else "no limit"
    head = f"\nOutputs against the original's, {samples} sample{'s' * (samples != 1)} of {PurePath(source).name}, {limits}:"
    table = _table("output", ">SQNR dB", ">cosine", ">max abs error", ">agreement")
    for output in metrics:
        table.add_row(*map(escape, output_row(output)))
    return Group(escape(head), table) if metrics else escape(head.rstrip(":"))


def inspection(found: Inspection, picture: str = "", *, with_groups: bool = False) -> RenderableType:
    """Returns the model's head line and its largest weights; and where the picture of its curves was written, if one was."""
    head = f"[bold]{escape(found.model)}[/]: {format_bytes(found.nbytes)}, opset {found.opset}, IR {found.ir_version}"
    ops = ", ".join(f"{op} {count}" for op, count in list(found.ops.items())[:8])
    table = _table("weight", ">bytes", ">zeros", ">distinct", ">entropy", ">MACs", "would act")
    for info in found.weights[:_MOST_WEIGHTS]:
        table.add_row(*_weight_row(info))
    rest = found.weights[_MOST_WEIGHTS:]
    signature = f"inputs:  {escape(', '.join(found.inputs))}\noutputs: {escape(', '.join(found.outputs))}\nnodes:   {ops}\n"
    lines: list[RenderableType] = [head, signature, table]
    if rest:
        lines.append(f"[dim]and {len(rest)} smaller ones, {format_bytes(sum(info.nbytes for info in rest))}; --json lists them all[/]")
    obstacles = _table("why a pass leaves weights alone", ">weights", ">bytes")
    for name, reason, count, nbytes in _obstacles(found.weights)[:_MOST_SKIPS]:
        obstacles.add_row(escape(f"{name}: {reason}"), str(count), format_bytes(nbytes))
    if obstacles.row_count:
        lines.append(obstacles)
    if with_groups:
        lines += channel_groups(found.groups)
    if found.ranks:
        lines += ranks(found.ranks)
    if found.sensitivity is not None:
        lines += sensitivity(found.sensitivity)
    if picture:
        lines.append(f"\ncurves drawn to {escape(picture)}")
    return Group(*lines, *(f"[yellow]note:[/] {escape(note)}" for note in found.notes))


def channel_groups(groups: Sequence[GroupInfo]) -> list[RenderableType]:
    """Returns the groups of channels that can be cut, most work first, and how many cannot, for which reason."""
    free = [group for group in groups if not group.obstacle]
    table = _table("group", ">channels", ">MACs", ">params", "computed by", "read by")
    for group in free[:_MOST_WEIGHTS]:
        sides = [_end_list([member.tensor for member in group.members if member.role == role]) for role in ("produces", "consumes")]
        name = escape(_end(group.name)) + ("\n[dim]a mean or norm is taken over them[/]" if group.resliced else "")
        share = "–" if group.macs is None else f"{group.macs:.1%}"
        table.add_row(name, str(group.channels), share, f"{group.params:.1%}", *sides)
    lines: list[RenderableType] = [f"\n{len(free)} of {len(groups)} groups of channels can be cut:", table]
    if len(free) > _MOST_WEIGHTS:
        lines.append(f"[dim]and {len(free) - _MOST_WEIGHTS} with less work; --json lists them all[/]")
    counts = Counter(in_general(group.obstacle) for group in groups if group.obstacle)
    obstacles = _table("why groups of channels stay", ">groups")
    for reason, count in counts.most_common(_MOST_SKIPS):
        obstacles.add_row(escape(reason), str(count))
    return [*lines, *([obstacles] if counts else [])]


def ranks(found: Sequence[RankInfo]) -> list[RenderableType]:
    """Returns how many dimensions each weight needs, largest first."""
    measured = any(info.outputs_at_90 is not None for info in found)
    columns = ["weight", ">full\nrank", ">\nbreaks even", ">\nstable", ">weights\n90 %", ">\n99 %"]
    table = _table(*columns, *((">outputs\n90 %", ">\n99 %") if measured else ()))
    for info in found[:_MOST_WEIGHTS]:
        name = f"{escape(_end(info.site))}\n[dim]{info.op} {info.sides[0]}x{info.sides[1]}[/]"
        cells = [info.full, info.break_even, f"{info.stable:.1f}", info.at_90, info.at_99]
        seen = ["–" if value is None else value for value in (info.outputs_at_90, info.outputs_at_99)]
        table.add_row(name, *map(str, [*cells, *(seen if measured else [])]))
    head = "\nRanks that hold so much of the squares of weights" + (" and of outputs:" if measured else ":")
    rest = len(found) - _MOST_WEIGHTS
    return [head, table, *([f"[dim]and {rest} smaller ones; --json lists them all[/]"] if rest > 0 else [])]


def sensitivity(found: Degradation) -> list[RenderableType]:
    """Returns what zeros do: in each layer alone, most sensitive first, then in the whole model."""
    notes: list[RenderableType] = [f"[yellow]note:[/] {escape(note)}" for note in found.notes]
    if not found.curves:
        return notes
    head = "\nZeros by magnitude in one layer alone, SQNR in dB, most sensitive first:"
    lines: list[RenderableType] = [head, _layers(found)]
    rest = len(found.layers) - _MOST_WEIGHTS
    if rest > 0:
        lines.append(f"[dim]and {rest} less sensitive ones; --json lists them all[/]")
    top1 = f", top-1 of the original {format_share(found.top1)}" if found.top1 is not None else ""
    of = f"{found.samples} sample{'s' * (found.samples != 1)} of {PurePath(found.inputs).name}"
    lines.append(f"\nZeros in all layers at once, {escape(of)}{top1}:")
    lines.append(_curves([curve for curve in found.curves if not curve.repaired], labels=found.top1 is not None))
    if repaired := [curve for curve in found.curves if curve.repaired]:
        lines += ["\nThe same, made up for:", _curves(repaired, labels=found.top1 is not None)]
    return [*lines, *notes]


def verification(found: Verification, limits: Tolerance) -> RenderableType:
    """Returns how a candidate compares with its original."""
    sizes = f"{format_bytes(found.bytes_before)} → {format_bytes(found.bytes_after)}"
    compared = found.comparison
    table = outputs(compared.outputs, compared.samples, found.inputs, limits)
    lines: list[RenderableType] = [table, *accuracy(compared.accuracy)]
    if found.synthetic:
        lines.append("[yellow]note:[/] inputs are synthetic, which proves less; give real ones with --inputs")
    if found.violation is None:
        lines.append("[green]within the limits[/]" if limits.is_set else "[green]valid[/]; no limit was set")
    return Group(*lines, sizes)


def demo(found: DemoResult) -> RenderableType:
    """Returns the compression and the accuracy before and after."""
    return Group(
        "A small CNN for 8x8 pictures of digits, trained beforehand; tidied, and its weights Huffman coded at 2.5 bits each:\n",
        compression(found.compressed.report),
        "\n[bold]The written file, on labelled pictures that compression never saw:[/]",
        verification(found.verification, Tolerance()),
        "\nNow with a model of yours:  [bold]onnxshrink compress model.onnx -o small.onnx --calib inputs.npz --min-sqnr 30[/]",
    )


def accuracy(found: Accuracy | None) -> list[RenderableType]:
    """Returns a line about labels that were hit, if there were labels."""
    if found is None:
        return []
    top1 = f"top-1 {format_share(found.top1_original)} → [bold]{format_share(found.top1_candidate)}[/]"
    top5 = f"top-5 {format_share(found.top5_original)} → {format_share(found.top5_candidate)}"
    return [f"{escape(found.output)}, {found.labels} labels: {top1}, {top5}"]


def expansion(found: Expanded, places: str) -> RenderableType:
    """Returns how many weights were expanded."""
    sizes = f"{format_bytes(found.bytes_before)} → {format_bytes(found.bytes_after)}"
    count = len(found.sites)
    what = f"{count} coded weight{'s' * (count != 1)} expanded, {sizes}" if count else "no coded weights, nothing to expand"
    return f"{what}, written to {escape(places)}"


def latency(report: LatencyReport, a: str, b: str) -> RenderableType:
    """Returns two models' latencies side by side."""
    table = _table("model", ">median ms", ">quartiles ms", ">session start ms")
    for name, spread, start in (("A", report.a_ms, report.a_start_ms), ("B", report.b_ms, report.b_start_ms)):
        path = a if name == "A" else b
        table.add_row(f"{name}  {escape(path)}", f"{spread.median:.3f}", f"{spread.low:.3f} to {spread.high:.3f}", f"{start:.1f}")
    ratio = f"B / A = [bold]{report.ratio.median:.3f}[/] (quartiles {report.ratio.low:.3f} to {report.ratio.high:.3f})"
    return Group(table, f"{ratio}, {report.runs} interleaved runs, {report.threads} thread{'s' * (report.threads != 1)}")


def passes(described: Sequence[PassInfo]) -> RenderableType:
    """Returns every pass with its options."""
    parts: list[RenderableType] = []
    for found in described:
        table = _table("option", "default", "allowed", "meaning")
        for info in found.options:
            table.add_row(info.name, str(info.default).lower(), escape(info.allowed), escape(info.help))
        parts += [f"\n[bold]{escape(found.name)}[/]  {escape(found.summary)}", table if found.options else "[dim]no options[/]"]
    return Group(*parts)


def _title(step: PassReport) -> str:
    """Returns the pass as one would write it after --pass: its name and what differs from the defaults."""
    changed = [f"{key.replace('_', '-')}={format_option(value)}" for key, value in step.options.items() if key in step.chosen]
    return f"{step.name}:{','.join(changed)}" if changed else step.name


def _skips(step: PassReport) -> list[RenderableType]:
    counted = skip_counts(step.skips)
    if not counted:
        return []
    table = _table(f"\n{step.name} left alone, because", "\n>sites", "\nfor instance")
    for reason, count, site in counted[:_MOST_SKIPS]:
        table.add_row(escape(reason), str(count), escape(site))
    if len(counted) > _MOST_SKIPS:
        table.add_row(f"[dim]{len(counted) - _MOST_SKIPS} more reasons; --report lists every site[/]", "", "")
    return [table]


def _weight_row(info: WeightInfo) -> list[str]:
    macs = "–" if info.macs is None else f"{info.macs / 1e6:.2f} M" if info.macs >= 10_000 else str(info.macs)
    stored = f"{format_bytes(info.nbytes)}\n[dim]{info.bits:.2f} bits each[/]" if info.coded else format_bytes(info.nbytes)
    weight = f"{escape(_end(info.site))}\n[dim]{info.op} {info.dtype} {'x'.join(map(str, info.shape))}[/]"
    entropy, acting = f"{info.entropy_bits:.2f} bits", "\n".join(info.actions) or "–"
    if info.code_bits is not None and info.code_entropy_bits is not None:
        entropy = f"{info.code_entropy_bits:.2f} bits\n[dim]{info.code_bits:.2f} coded[/]"
    return [weight, stored, f"{info.zeros:.1%}", str(info.distinct), entropy, macs, acting]


def _end(site: str, longest: int = _LONGEST_SITE) -> str:
    return site if len(site) <= longest else f"…{site[1 - longest :]}"


def _end_list(names: Sequence[str], most: int = 2) -> str:
    """Returns the first of several names, and how many more there are."""
    shown = [escape(_end(name)) for name in names[:most]]
    return "\n".join([*shown, *([f"[dim]and {len(names) - most} more[/]"] if len(names) > most else [])]) or "–"


def _decibels(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}"  # + 0: no -0.0


def _layers(found: Degradation) -> Table:
    """Returns the layers' SQNR by pattern and sparsity."""
    points = {
        (layer.site, pattern, point.sparsity): point
        for layer in found.layers
        for pattern, curve in layer.curves.items()
        for point in curve
    }
    columns = sorted({key[1:] for key in points}, key=lambda key: (key[0] != "unstructured", *key))
    first = dict(reversed(columns))
    names = (f">{pattern if first[pattern] == sparsity else ''}\n{sparsity:.0%}" for pattern, sparsity in columns)
    table = _table("\nlayer", ">\nshare", *names)
    for layer in found.layers[:_MOST_WEIGHTS]:
        mine = [points.get((layer.site, *column)) for column in columns]
        name = f"{escape(_end(layer.site, _LONGEST_LAYER))}\n[dim]{layer.op} {'x'.join(map(str, layer.shape))}[/]"
        table.add_row(name, f"{layer.share:.1%}", *(_decibels(point.sqnr_db) if point else "–" for point in mine))
    return table


def _curves(curves: Sequence[ModelCurve], *, labels: bool) -> Table:
    """Returns curves of the whole model side by side; accuracy where there are labels, else agreement."""
    decides = labels or any(point.agreement is not None for curve in curves for point in curve.points)
    table = _table(">\nzeros")
    for curve in curves:
        for index, column in enumerate(["dB", "top-1" if labels else "agreement"][: 1 + decides]):
            table.add_column(f"{curve.pattern if not index else ''}\n{column}", justify="right", overflow="fold")
    for points in zip(*(curve.points for curve in curves), strict=True):
        cells = [_curve_cells(point, labels)[: 1 + decides] for point in points]
        table.add_row(f"{points[0].sparsity:.0%}", *(cell for pair in cells for cell in pair))
    return table


def _curve_cells(point: ModelPoint, labels: bool) -> tuple[str, str]:
    share = point.top1 if labels else point.agreement
    return ("broken" if point.failure else _decibels(point.sqnr_db), "–" if share is None else format_share(share))


def _obstacles(weights: Sequence[WeightInfo]) -> list[tuple[str, str, int, int]]:
    """Returns (pass, reason, weights, bytes), most bytes first; reasons that differ in numbers and names only count as one."""
    groups: dict[tuple[str, str], list[int]] = {}
    for info in weights:
        for name, reason in info.obstacles.items():
            groups.setdefault((name, in_general(reason)), []).append(info.nbytes)
    rows = [(name, reason, len(sizes), sum(sizes)) for (name, reason), sizes in groups.items()]
    return sorted(rows, key=lambda row: -row[3])


def _table(*columns: str) -> Table:
    """Returns an empty table; a column whose name starts with > is right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.replace(">", ""), justify="right" if ">" in column else "left", overflow="fold")
    return table
