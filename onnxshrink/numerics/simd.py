"""How many channels a convolution of ONNX Runtime computes at a time on this processor.

On x86 its convolutions work in blocks of 16 channels with AVX-512 and of 8 with AVX (MLAS, MlasNchwcGetBlockSize), its matrix products in
columns of 16. Time is a staircase: 33 channels take as long as 48. Measured with ONNX Runtime 1.31, one thread, a chain of 3x3
convolutions with AVX-512: 64 channels 10.3 ms, 60 and 52 10.3, 48 and 40 5.8, 32 2.7.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["channel_block"]

_AVX512, _OTHER = 16, 8


def channel_block() -> int:
    """Returns the number of channels in a block: 16 with AVX-512, else 8."""
    config: Any = np.show_config(mode="dicts")
    known = config.get("SIMD Extensions", {})
    names = [*known.get("baseline", ()), *known.get("found", ())]
    return _AVX512 if any(name.startswith("AVX512") or name == "X86_V4" for name in names) else _OTHER
