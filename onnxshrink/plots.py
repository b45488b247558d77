"""Pictures, drawn by matplotlib, which is an extra and is imported when a picture is asked for.

    check_picture("curves.png")                  # before any long work
    draw_degradation(found, "curves.png")

No window is opened and no global state of matplotlib is changed: figures are made without pyplot. Same data, same bytes, for one version
of matplotlib: dates are left out, and ids in SVG do not depend on chance (matplotlib's documentation, Reproducible builds).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxshrink.degradation import Degradation, LayerCurves, ModelCurve
from onnxshrink.errors import OptionError, must
from onnxshrink.graph.files import atomic_file, check_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SUFFIXES", "check_picture", "draw_degradation"]

SUFFIXES = (".pdf", ".png", ".svg")
_DATES: dict[str, dict[str, Any]] = {".pdf": {"CreationDate": None}, ".png": {}, ".svg": {"Date": None}}
_MOST_LAYERS, _LONGEST_SITE = 30, 32
_FLOOR_DB = -20.0  # the error is ten times the output: below it nothing is left to tell apart
_EQUAL_DB = 200.0  # beyond what float32 resolves: outputs are equal, for instance where no row of few was zeroed, and have no place
_MARKERS = "os^Dv"


def check_picture(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Checks, before any long work, that a picture can be drawn and written there.

    Args:
        path: of the picture.
        inputs: files that it must not replace.

    Raises:
        OptionError: the suffix is of no known format, or matplotlib is not installed.
        OutputError: the place cannot be written, or it is one of the inputs.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise OptionError(must("picture", "file name", f"one that ends in {', '.join(SUFFIXES)}", Path(path).name))
    try:
        import matplotlib as mpl  # noqa: F401, PLC0415  # an extra
    except ImportError:
        raise OptionError("picture: needs matplotlib, which is not installed: pip install 'onnxshrink[plot]'") from None
    check_output(path, inputs)


def draw_degradation(found: Degradation, path: str | os.PathLike[str], title: str = "") -> None:
    """Draws the curves of the whole model and the most sensitive layers, and writes the picture atomically.

    Args:
        found: what was measured.
        path: of the picture; its suffix, one of `SUFFIXES`, says which format.
        title: above all, for instance the name of the model.

    Raises:
        OptionError: as `check_picture`.
        OutputError: the place cannot be written.
    """
    check_picture(path)
    from matplotlib import rc_context  # noqa: PLC0415  # an extra
    from matplotlib.figure import Figure  # noqa: PLC0415

    decides = any(_decisions(curve, labels=found.top1 is not None)[1] for curve in found.curves)
    with rc_context({"svg.hashsalt": "onnxshrink"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of names in scripts that the font lacks: boxes do
        figure = Figure(figsize=(4.6 * (2 + decides) + 1.5, 5.4), dpi=120, layout="constrained")
        figure.suptitle(f"{title}\nzeros by magnitude, {found.samples} samples".strip(), parse_math=False)
        panels = figure.subplots(1, 2 + decides, squeeze=False)[0]
        if decides:
            _draw_decisions(panels[0], found)
        _draw_sqnr(panels[-2], found)
        _draw_layers(panels[-1], found)
        _write(figure, Path(path))


def _draw_decisions(axes: Axes, found: Degradation) -> None:
    """Draws top-1 accuracy where there are labels, else agreement with the original."""
    labels = found.top1 is not None
    whole = found.top1 if found.top1 is not None else 1.0  # without zeros it agrees with itself
    patterns = _patterns(found)
    for curve in found.curves:
        sparsities, shares = _decisions(curve, labels=labels)
        _line(axes, [0.0, *sparsities], [100 * share for share in (whole, *shares)], curve, patterns.index(curve.pattern))
    axes.set_ylabel("top-1 accuracy, %" if labels else "decisions that agree with the original's, %")
    axes.set_ylim(bottom=0)
    _finish(axes)


def _draw_sqnr(axes: Axes, found: Degradation) -> None:
    patterns = _patterns(found)
    for curve in found.curves:
        points = [point for point in curve.points if point.sqnr_db < _EQUAL_DB]
        decibels = [max(point.sqnr_db, _FLOOR_DB) for point in points]
        _line(axes, [point.sparsity for point in points], decibels, curve, patterns.index(curve.pattern))
    axes.set_ylabel("SQNR of the worst output, dB")
    _finish(axes)


def _draw_layers(axes: Axes, found: Degradation) -> None:
    """Draws the SQNR that zeros in one layer alone leave, most sensitive on top."""
    layers = found.layers[:_MOST_LAYERS]
    for index, pattern in enumerate(_patterns(found)):
        points = [
            (max(point.sqnr_db, _FLOOR_DB), place)
            for place, layer in enumerate(layers)
            for point in layer.curves.get(pattern, ())
            if point.sparsity == found.ranked_at and point.sqnr_db < _EQUAL_DB
        ]
        decibels, places = [point for point, _ in points], [place for _, place in points]
        axes.plot(decibels, places, _MARKERS[index % len(_MARKERS)], color=f"C{index}", label=pattern)
    axes.set_yticks(range(len(layers)))
    axes.set_yticklabels([_named(layer) for layer in layers], fontsize=7, parse_math=False)
    axes.invert_yaxis()
    more = f" (of {len(found.layers)})" if len(found.layers) > len(layers) else ""
    axes.set_title(f"most sensitive layers{more}", fontsize="medium")
    axes.set_xlabel(f"SQNR, dB, with {found.ranked_at:.0%} zeros in one layer")
    axes.grid(alpha=0.3)
    if layers:
        axes.legend()


def _patterns(found: Degradation) -> list[str]:
    """Returns the patterns in the order of their colors: one each, the same in all panels; what is made up for has another line."""
    of_layers = (pattern for layer in found.layers for pattern in layer.curves)
    return list(dict.fromkeys([*(curve.pattern for curve in found.curves), *of_layers]))


def _line(axes: Axes, sparsities: Sequence[float], values: Sequence[float], curve: ModelCurve, index: int) -> None:
    plain = curve.pattern if not curve.repaired else f"{curve.pattern}, made up for"
    style = "-" if curve.repaired else "--"
    percent = [100 * sparsity for sparsity in sparsities]
    axes.plot(percent, values, style, marker=_MARKERS[index % len(_MARKERS)], color=f"C{index}", label=plain)


def _finish(axes: Axes) -> None:
    axes.set_title("whole model", fontsize="medium")
    axes.set_xlabel("zeros in every layer, %")
    axes.set_xlim(0, 100)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _decisions(curve: ModelCurve, *, labels: bool) -> tuple[list[float], list[float]]:
    """Returns (sparsities, shares of right decisions) of the points that have them."""
    shares = [(point.sparsity, point.top1 if labels else point.agreement) for point in curve.points]
    known = [(sparsity, share) for sparsity, share in shares if share is not None]
    return [sparsity for sparsity, _ in known], [share for _, share in known]


def _named(layer: LayerCurves) -> str:
    site = layer.site if len(layer.site) <= _LONGEST_SITE else f"…{layer.site[1 - _LONGEST_SITE :]}"
    return f"{site}  {layer.share:.1%}"


def _write(figure: Figure, path: Path) -> None:
    suffix = path.suffix.lower()
    with atomic_file(path) as file:
        figure.savefig(file, format=suffix[1:], metadata=_DATES[suffix])
