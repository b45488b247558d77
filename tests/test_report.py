"""Reports: strict JSON and Markdown with everything in it, sizes and counts for people."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.contract import Change, Skip
from onnxshrink.metrics import OutputMetrics
from onnxshrink.report import CompressionReport, Outcome, PassReport, format_bytes, in_general, skip_counts
from onnxshrink.validate import Accuracy, Tolerance

OUTPUT = OutputMetrics("logits", 0.01, 40.0, 0.99995, 0.25, 0.98)
UNDECIDED = OutputMetrics("mask|alpha", 1e15, -300.0, 0.0, 3e38, None)


def step(outcome: Outcome = "kept", **values: Any) -> PassReport:
    default = PassReport(
        name="share-weights",
        options={"bits": 6, "method": "auto", "per": "scale"},
        outcome=outcome,
        reason="",
        bytes_before=1000,
        bytes_after=300,
        seconds=0.25,
        chosen=("bits",),
        changes=[Change("conv.weight", 700, 90, "k-means to 64 values")],
        skips=[Skip("bias|odd", "too small to gain: 40 bytes")],
        notes=["a note of the pass"],
        outputs=[OUTPUT],
    )
    return dataclasses.replace(default, **values)


def report(*steps: PassReport, **values: Any) -> CompressionReport:
    default = CompressionReport(
        model="model.onnx",
        bytes_before=1000,
        bytes_after=300,
        tolerance=Tolerance(min_sqnr_db=30, min_agreement=0.9),
        inputs="calib.npz",
        validation_samples=5,
        calibration_samples=15,
        synthetic=False,
        seed=3,
        passes=steps or (step(),),
        outputs=(OUTPUT, UNDECIDED),
        accuracy=Accuracy("logits", 20, 0.9, 0.85, 1.0, 0.95),
        metrics={"mine": 0.5},
        notes=("a note of the whole",),
        versions={"onnx": "1.2"},
    )
    return dataclasses.replace(default, **values)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


class TestJson:
    def test_is_strict_and_says_everything(self) -> None:
        found = json.loads(report().to_json(), parse_constant=refuse)
        assert (found["bytes_before"], found["bytes_after"]) == (1000, 300)
        assert found["ratio"] == pytest.approx(1000 / 300)
        assert found["target_reached"] is True
        assert found["tolerance"] == {"min_sqnr_db": 30, "max_drift": None, "min_agreement": 0.9}
        assert found["outputs"][0] == {
            "name": "logits",
            "drift": 0.01,
            "sqnr_db": 40.0,
            "cosine": 0.99995,
            "max_abs": 0.25,
            "agreement": 0.98,
            "exact": False,
            "blank": False,
        }
        assert found["outputs"][1]["agreement"] is None
        (only,) = found["passes"]
        assert only["changes"] == [
            {"site": "conv.weight", "bytes_before": 700, "bytes_after": 90, "detail": "k-means to 64 values"}
        ]
        assert only["skips"] == [{"site": "bias|odd", "reason": "too small to gain: 40 bytes"}]
        assert only["options"] == {"bits": 6, "method": "auto", "per": "scale"}
        assert (found["metrics"], found["accuracy"]["top1_candidate"]) == ({"mine": 0.5}, 0.85)
        fields = {field.name for field in dataclasses.fields(CompressionReport)}
        assert found.keys() == fields | {"ratio", "target_reached"}

    def test_not_a_number_is_never_written(self) -> None:
        with pytest.raises(ValueError, match="Out of range float"):
            report(metrics={"mine": float("nan")}).to_json()


class TestMarkdown:
    def test_names_every_change_skip_and_note(self) -> None:
        dropped = step("dropped", reason="output 'y': SQNR must be at least 30 dB", changes=(), notes=["another note"])
        text = report(step(), dropped).to_markdown()
        lines = text.split("\n")
        assert lines[0] == "# model.onnx"
        assert "1.0 KB → 300 B (3.33x smaller)" in lines
        limits = "SQNR at least 30 dB, agreement at least 0.9"
        assert f"Validated on 5 inputs: calib.npz. Limits: {limits}." in lines
        assert "| logits | 40.0 | 0.999950 | 0.25 | 98.0% |" in lines
        assert "| mask\\|alpha | -300.0 | 0.000000 | 3e+38 | – |" in lines
        assert "| conv.weight | 700 | 90 | k-means to 64 values |" in lines
        assert lines.count("| bias\\|odd | too small to gain: 40 bytes |") == 2
        assert "## share-weights (bits=6, method=auto, per=scale): kept" in lines
        assert "## share-weights (bits=6, method=auto, per=scale): dropped" in lines
        assert "output 'y': SQNR must be at least 30 dB" in lines
        assert {"- a note of the whole", "- a note of the pass", "- another note"} <= set(lines)
        assert text.endswith("\n")

    def test_every_row_of_a_table_has_as_many_cells_as_its_header(self) -> None:
        rows = [line for line in report().to_markdown().split("\n") if line.startswith("|")]
        widths = [line.replace("\\|", "").count("|") for line in rows]
        headers = [index for index, line in enumerate(rows) if line.startswith("| ---")]
        assert len(headers) == 3
        for start, stop in zip(headers, [*(index - 1 for index in headers[1:]), len(rows)], strict=True):
            assert len(set(widths[start - 1 : stop])) == 1

    def test_without_anything_done_there_are_no_tables(self) -> None:
        text = report(step(changes=(), skips=(), notes=()), outputs=(), notes=()).to_markdown()
        assert "|" not in text


class TestTarget:
    @pytest.mark.parametrize(
        ("outcomes", "expected"),
        [
            ([], True),
            (["kept", "unchanged", "weakened"], True),
            (["kept", "dropped"], False),
            (["dropped", "kept"], False),
        ],
    )
    def test_is_missed_when_a_pass_was_dropped(self, outcomes: list[Outcome], expected: bool) -> None:
        steps = tuple(step(outcome) for outcome in outcomes)
        assert report(passes=steps).target_reached is expected

    def test_ratio_of_nothing_is_finite(self) -> None:
        assert report(bytes_before=10, bytes_after=0).ratio == 10


class TestForPeople:
    @pytest.mark.parametrize(
        ("count", "text"),
        [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 KB"),
            (26_627, "26.6 KB"),
            (1_500_000, "1.5 MB"),
            (2**31, "2.1 GB"),
            (10**15, "1000000.0 GB"),
        ],
    )
    def test_sizes(self, count: int, text: str) -> None:
        assert format_bytes(count) == text

    @settings(deadline=None)
    @given(st.integers(0, 10**14))
    def test_sizes_are_right_to_a_twentieth_of_their_unit(self, count: int) -> None:
        number, unit = format_bytes(count).split()
        scale = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[unit]
        assert abs(float(number) * scale - count) <= 0.0501 * scale

    def test_reasons_are_counted_most_frequent_first(self) -> None:
        skips = [Skip("a", "x"), Skip("b", "y"), Skip("c", "y"), Skip("d", "z"), Skip("e", "y")]
        assert skip_counts(skips) == [("y", 3, "b"), ("x", 1, "a"), ("z", 1, "d")]
        assert skip_counts([]) == []

    def test_reasons_that_differ_in_numbers_are_one_and_a_single_one_keeps_its_numbers(self) -> None:
        skips = [Skip("a", "takes 10 bytes"), Skip("b", "takes 1,024.5 bytes"), Skip("c", "has 3 rows")]
        assert skip_counts(skips) == [("takes … bytes", 2, "a"), ("has 3 rows", 1, "c")]

    @pytest.mark.parametrize(
        ("reason", "expected"),
        [
            ("", ""),
            ("no numbers, at all.", "no numbers, at all."),
            ("929 bytes, dense 151.", "… bytes, dense …."),
            ("opset 6 is below 7, the first", "opset … is below …, the first"),
            ("50.0% zeros", "…% zeros"),
            ("holds int64 values", "holds int64 values"),
        ],
    )
    def test_numbers_are_taken_out_with_what_parts_their_digits(self, reason: str, expected: str) -> None:
        assert in_general(reason) == expected
