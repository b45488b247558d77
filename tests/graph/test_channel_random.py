"""Random networks: what is left of them after a random cut computes what the original does without the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.graph.channel_oracle import cut_and_compare
from tests.graph.test_channel_rules import N, build, ints

SIZE = 3  # of pictures


class Sketch:
    """A network in the making: lines for `build`, its constants, and how many channels each [N, channels, 3, 3] tensor has."""

    def __init__(self) -> None:
        self.lines: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.widths = {"x": 4}

    def constant(self, values: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = values
        return name

    def then(self, text: str, width: int = 0, **attributes: Any) -> str:
        name = f"t{len(self.lines)}"
        self.lines.append((f"{text} -> {name}", attributes))
        if width:
            self.widths[name] = width
        return name

    def conv(self, source: str, width: int, channels: int, group: int = 1) -> str:
        return self.then(f"Conv {source} {self.constant((width, channels // group, 1, 1))}", width, group=group)

    def grow(self, kind: str, source: str, other: str, numbers: list[int]) -> None:
        """Adds one thing to the network, if the widths allow it."""
        width, first = self.widths[source], numbers[0]
        if kind == "conv":
            self.conv(source, first, width)
        elif kind == "grouped" and width % 2 == 0:
            self.conv(source, 2 * first, width, 2)
        elif kind == "depthwise":
            self.conv(source, width * (1 + first % 2), width, width)
        elif kind == "function":
            self.then(f"{['Relu', 'Sigmoid', 'Cos'][first % 3]} {source}", width)
        elif kind == "sum":
            self.then(f"Add {source} {self.conv(other, width, self.widths[other])}", width)
        elif kind == "concat":
            self.then(f"Concat {source} {other} {source}", 2 * width + self.widths[other], axis=1)
        elif kind == "slice" and width > 1:
            start, end = self.constant(ints(first % (width - 1))), self.constant(ints(width - first % 2))
            self.then(f"Slice {source} {start} {end} {self.constant(ints(1))}", width - first % 2 - first % (width - 1))
        elif kind == "gather":
            places = [number % (2 * width) - width for number in numbers]
            self.then(f"Gather {source} {self.constant(ints(*places))}", len(places), axis=1)
        elif kind == "shuffle" and width % 2 == 0:
            apart = self.then(f"Reshape {source} {self.constant(ints(0, 2, -1, SIZE, SIZE))}")
            turned = self.then(f"Transpose {apart}", perm=[0, 2, 1, 3, 4])
            self.then(f"Reshape {turned} {self.constant(ints(0, -1, SIZE, SIZE))}", width)
        elif kind == "gate":
            pooled = self.then(f"GlobalAveragePool {source}")
            hidden = self.then(f"Conv {pooled} {self.constant((first, width, 1, 1))}")
            gate = self.then(f"Conv {hidden} {self.constant((width, first, 1, 1))}")
            self.then(f"Mul {source} {gate}", width)
        elif kind == "channels last":
            turned = self.then(f"Transpose {source}", perm=[0, 2, 3, 1])
            product = self.then(f"MatMul {turned} {self.constant((width, first))}")
            self.then(f"Transpose {product}", first, perm=[0, 3, 1, 2])
        elif kind == "attention":
            rows = self.then(f"Reshape {source} {self.constant(ints(N, width, SIZE * SIZE))}")
            turned = self.then(f"Transpose {rows}", perm=[0, 2, 1])
            weights = self.then(f"Softmax {self.then(f'MatMul {turned} {rows}')}", axis=-1)
            mixed = self.then(f"Transpose {self.then(f'MatMul {weights} {turned}')}", perm=[0, 2, 1])
            self.then(f"Reshape {mixed} {self.constant(ints(N, width, SIZE, SIZE))}", width)


KINDS = ["channels last", *"conv grouped depthwise function sum concat slice gather shuffle gate attention".split()]


@st.composite
def networks(draw: st.DrawFn) -> Any:
    """Draws a network that ends in a convolution of one or two of its tensors."""
    sketch = Sketch()
    for _ in range(draw(st.integers(1, 10))):
        names = sorted(sketch.widths, key=lambda name: int(name[1:] or -1))[-4:]
        numbers = draw(st.lists(st.integers(2, 9), min_size=2, max_size=6))
        sketch.grow(draw(st.sampled_from(KINDS)), draw(st.sampled_from(names)), draw(st.sampled_from(names)), numbers)
    last, width = list(sketch.widths.items())[-1]
    sketch.lines.append(f"Conv {last} {sketch.constant((3, width, 1, 1))} -> y")
    return build(sketch.lines, (N, 4, SIZE, SIZE), **sketch.constants)


@settings(max_examples=80, deadline=None)
@given(model=networks(), seed=st.integers(0, 99), outer=st.booleans())
def test_random_networks(model, seed, outer):
    with np.errstate(all="ignore"):
        error, _, _ = cut_and_compare(model, seed=seed, share=0.7, outer=outer)
    assert error < 2e-5
