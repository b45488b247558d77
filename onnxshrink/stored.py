"""What takes the place of a weight in the file: its codes and what decodes them, or float16; where that takes fewer bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.coding import Coding
from onnxshrink.contract import Change, Skip
from onnxshrink.graph.codebook import coded_weight, half_weight
from onnxshrink.graph.coded_table import TableFragment, coded_table, lookups
from onnxshrink.graph.edit import Fragment, NameSource, constant_bytes, replace_constant
from onnxshrink.graph.weights import Weight

__all__ = ["Half", "halved", "stored"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Half:
    """What a weight becomes when it is rounded to float16."""

    detail: str = "float16"


def halved(weight: Weight, values: Array) -> Half | Skip:
    """Returns the float16 form of a weight of 4 or 8 bytes an element that fits its range."""
    if values.dtype.itemsize <= 2:
        return Skip(weight.site, f"is {values.dtype} already")
    if max(-values.min(), values.max()) > np.finfo(np.float16).max:
        return Skip(weight.site, "has values beyond the range of float16")
    return Half()


def stored(weight: Weight, coding: Coding | Half | Skip, names: NameSource) -> Change | Skip:
    """Replaces a weight by its coded form if that takes fewer bytes."""
    if isinstance(coding, Skip):
        return coding
    constant, scope = weight.constant, weight.scope.graph
    before = constant_bytes(constant, scope)
    overridable = constant in scope.overridable
    readers = lookups(constant, scope) if isinstance(coding, Coding) else []
    fragment: Fragment | TableFragment
    if isinstance(coding, Half):
        fragment = half_weight(constant, scope, names)
    elif readers:
        fragment = coded_table(constant, readers, coding.codes, coding.bits, coding.values, scope, names)
    else:
        fragment = coded_weight(constant, coding.codes, coding.bits, coding.values, scope, names)
    after = fragment.nbytes(scope)
    if after >= before:
        return Skip(weight.site, f"too small to gain: {after} bytes as codes ({coding.detail}), {before} bytes as it is")
    if isinstance(fragment, TableFragment):
        fragment.insert(scope, constant)
    else:
        replace_constant(scope, constant, fragment)
    note = "; no longer a graph input that callers can override" if overridable else ""
    return Change(weight.site, before, after, coding.detail + (", coded at run time" if readers else "") + note)
