"""Functions of one variable, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from onnxshrink.graph.elementwise import FUNCTIONS
from onnxshrink.graph.files import load
from tests.oracle import run, session

CASES = {
    "Clip": ["<>", "<min>"],
    "Elu": ["", "<alpha = 0.3>"],
    "Erf": [""],
    "Gelu": ["", '<approximate = "tanh">'],
    "HardSigmoid": ["", "<alpha = 0.5, beta = 0.1>"],
    "HardSwish": [""],
    "LeakyRelu": ["", "<alpha = 0.3>"],
    "Neg": [""],
    "Relu": [""],
    "Sigmoid": [""],
    "Softplus": [""],
    "Tanh": [""],
}


@pytest.mark.parametrize(("op", "attributes"), [(op, one) for op, several in CASES.items() for one in several])
def test_functions_are_those_of_onnx(op, attributes):
    operands = {"<>": "(x, low, high)", "<min>": "(x, low)"}.get(attributes, f"{attributes}(x)")
    body = f"{{ low = Constant<value = float {{-0.5}}>() high = Constant<value = float {{0.75}}>() y = {op}{operands} }}"
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]> g (float[401] x) => (float[401] y) {body}')
    x = np.linspace(-6, 6, 401).astype(np.float32)
    (expected,) = run(session(model), {"x": x})
    node = next(node for node in load(model).nodes if node.op == op)
    np.testing.assert_allclose(FUNCTIONS[op](x.astype(np.float64), node), expected, atol=1e-6)


def test_every_function_is_tested():
    assert set(CASES) == set(FUNCTIONS)
