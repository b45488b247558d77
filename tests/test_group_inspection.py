"""What is said of groups of channels, compared with what their removal really saves."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxshrink import inspect
from onnxshrink.graph.files import load
from onnxshrink.group_inspection import group_infos
from tests import oracle


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def two_branches() -> onnx.ModelProto:
    """Returns x -> (3 -> 4, 3 -> 6) -> Concat -> 10 -> 2, kernels of 1, on 5 x 5 pictures."""
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["p"]),
        helper.make_node("Conv", ["x", "b"], ["q"]),
        helper.make_node("Concat", ["p", "q"], ["c"], axis=1),
        helper.make_node("Conv", ["c", "d"], ["y"]),
    ]
    constants = [oracle.value("a", normal(4, 3, 1, 1)), oracle.value("b", normal(6, 3, 1, 1, seed=1)), oracle.value("d", normal(2, 10, 1, 1, seed=2))]
    return oracle.make_model(nodes, [oracle.tensor("x", (1, 3, 5, 5))], [oracle.tensor("y", (1, 2, 5, 5))], constants, opset=17)


def test_shares_of_work_and_parameters() -> None:
    infos = {info.name: info for info in group_infos(load(two_branches()), None)}
    macs = 3 * 4 + 3 * 6 + 10 * 2
    assert infos["b"].channels == 6
    assert infos["b"].macs == pytest.approx((3 * 6 + 6 * 2) / macs)
    assert infos["a"].params == pytest.approx((3 * 4 + 4 * 2) / macs)
    assert [(member.tensor, member.axis, member.role) for member in infos["a"].members] == [("a", 0, "produces"), ("d", 1, "consumes")]
    assert not infos["a"].obstacle


def test_what_cannot_be_cut_comes_last_and_says_why() -> None:
    infos = group_infos(load(two_branches()), None)
    assert [bool(info.obstacle) for info in infos] == sorted(bool(info.obstacle) for info in infos)
    assert {info.obstacle for info in infos if info.obstacle} == {"a graph input ('x')", "a graph output ('y')"}


def test_inspection_holds_the_groups_with_measured_work() -> None:
    found = inspect(two_branches())
    assert [info.name for info in found.groups[:2]] == ["b", "a"]
    assert found.groups[0].macs == pytest.approx(30 / 50)
    assert found.to_dict()["groups"][0]["members"][0]["role"] in ("produces", "consumes", "follows")
