"""Pictures: that they are written, hold something, and that what stands in their way is one clear line."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from onnxshrink.degradation import Degradation, LayerCurves, LayerPoint, ModelCurve, ModelPoint
from onnxshrink.errors import OptionError, OutputError
from onnxshrink.plots import check_picture, draw_degradation


def layer(site: str, *decibels: float) -> LayerCurves:
    points = [LayerPoint(sparsity, 10 ** (-db / 20), db) for sparsity, db in zip((0.3, 0.5), decibels, strict=True)]
    return LayerCurves(site, "Conv", (4, 4), 0.5, {"unstructured": points, "rows": points})


def curve(pattern: str, *, repaired: bool, agreement: float | None = 0.5) -> ModelCurve:
    points = [ModelPoint(share, share, 0.1, 20 - 9 * share, agreement, None, None) for share in (0.2, 0.6)]
    broken = ModelPoint(0.9, 0.9, 1e15, -300.0, None, None, "NaN")
    return ModelCurve(pattern, repaired, [*points, broken])


def degraded(agreement: float | None = 0.5, sites: tuple[str, ...] = ("conv1", "conv2")) -> Degradation:
    curves = [curve(pattern, repaired=done, agreement=agreement) for pattern in ("unstructured", "rows") for done in (False, True)]
    return Degradation("calib.npz", 10, 0.5, [layer(site, 12.0, 3.0) for site in sites], curves, None)


def pixels(data: bytes) -> np.ndarray:
    """Returns [rows, columns, 4] of an RGBA PNG, by the specification: signature, chunks with checksums, filtered rows."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = [], 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack(">I", data[place + 8 + length : place + 12 + length])
        assert checksum == zlib.crc32(kind + body)
        chunks.append((kind, body))
        place += 12 + length
    assert (chunks[0][0], chunks[-1][0]) == (b"IHDR", b"IEND")
    width, height, depth, color = struct.unpack(">IIBB", chunks[0][1][:10])
    assert (depth, color) == (8, 6)
    rows = zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    return np.frombuffer(rows, np.uint8).reshape(height, 1 + 4 * width)


def test_a_png_is_valid_and_holds_something(tmp_path: Path) -> None:
    draw_degradation(degraded(), tmp_path / "curves.png", "model.onnx")
    found = pixels((tmp_path / "curves.png").read_bytes())
    assert found.shape[0] > 400
    assert len(np.unique(found, axis=0)) > 200  # an empty picture has rows that are all alike
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png"]


def test_an_svg_names_layers_and_patterns(tmp_path: Path) -> None:
    path = tmp_path / "curves.svg"
    draw_degradation(degraded(), path, "model.onnx")
    text = path.read_text()
    root = ET.fromstring(text)
    assert root.tag.endswith("svg")
    for comment in ("model.onnx", "conv1  50.0%", "unstructured, made up for", "rows", "zeros in every layer"):
        assert comment in text  # letters are drawn as shapes, with the text beside them as a comment


def test_a_pattern_has_one_color_in_all_panels(tmp_path: Path) -> None:
    draw_degradation(degraded(), tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text()
    assert [color in text for color in ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728")] == [True, True, False, False]


def test_a_pdf_is_one(tmp_path: Path) -> None:
    draw_degradation(degraded(), tmp_path / "curves.PDF")
    assert (tmp_path / "curves.PDF").read_bytes().startswith(b"%PDF-")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_same_data_same_bytes(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        draw_degradation(degraded(), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(
    "found",
    [
        degraded(agreement=None),
        degraded(sites=("a$b_{$", "层/权重", "x" * 300, *(f"w{index}" for index in range(40)))),
        degraded(sites=()),
        Degradation("calib.npz", 1, 0.5, [], [], None),
        Degradation("calib.npz", 1, 0.5, [layer("w", 300.0, 300.0)], [], None),
        Degradation("calib.npz", 1, 0.5, [layer("w", -300.0, -300.0)], [curve("rows", repaired=False)], 0.8),
    ],
    ids=["nothing decided", "odd names", "no layers", "nothing", "nothing changes", "labels"],
)
def test_any_data_can_be_drawn(tmp_path: Path, found: Degradation) -> None:
    draw_degradation(found, tmp_path / "curves.png", "a$b_{$ 模型")
    assert pixels((tmp_path / "curves.png").read_bytes()).size


class TestObstacles:
    @pytest.mark.parametrize("name", ["curves", "curves.jpg", "curves.json", ".png"])
    def test_unknown_formats(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(OptionError, match=r"must be one that ends in .pdf, .png, .svg, got"):
            check_picture(tmp_path / name)

    def test_no_matplotlib(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        for refuse in (check_picture, lambda path: draw_degradation(degraded(), path)):
            with pytest.raises(OptionError, match=r"not installed: pip install 'onnxshrink\[plot\]'$"):
                refuse(tmp_path / "curves.png")
        assert list(tmp_path.iterdir()) == []

    def test_places_that_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="missing"):
            check_picture(tmp_path / "missing" / "curves.png")
        with pytest.raises(OutputError, match="must not replace"):
            check_picture(tmp_path / "in.png", inputs=[tmp_path / "in.png"])
