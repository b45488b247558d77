"""Tests of the block of channels that this processor computes at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxshrink.numerics.simd import channel_block


@pytest.mark.parametrize(
    ("known", "block"),
    [
        ({"SIMD Extensions": {"baseline": ["SSE"], "found": ["AVX", "AVX2", "AVX512F", "AVX512_SKX"]}}, 16),
        ({"SIMD Extensions": {"baseline": ["X86_V2"], "found": ["X86_V3", "X86_V4"]}}, 16),
        ({"SIMD Extensions": {"baseline": ["X86_V2"], "found": ["X86_V3"]}}, 8),
        ({"SIMD Extensions": {"baseline": ["AVX512F"]}}, 16),
        ({"SIMD Extensions": {"baseline": ["NEON", "ASIMD"], "found": ["ASIMDHP"], "not found": ["AVX512F"]}}, 8),
        ({"SIMD Extensions": {}}, 8),
        ({}, 8),
    ],
)
def test_blocks(monkeypatch: pytest.MonkeyPatch, known: dict[str, Any], block: int) -> None:
    monkeypatch.setattr(np, "show_config", lambda mode: known)
    assert channel_block() == block


def test_this_processor_has_one() -> None:
    assert channel_block() in (8, 16)
