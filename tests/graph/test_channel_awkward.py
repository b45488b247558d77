"""Channels of the tiny models that are awkward in one way each, and cuts that follow each other."""

from __future__ import annotations

import pytest

from onnxshrink.testing_models import awkward_models
from tests.graph.channel_oracle import cut_and_compare
from tests.graph.test_channel_rules import CASES

MODELS = dict(awkward_models())


@pytest.mark.parametrize("awkward", MODELS)
def test_awkward_models(awkward):
    for seed in range(2):
        error, _, _ = cut_and_compare(MODELS[awkward], seed=seed, share=1.0)
        assert error < (2e-3 if "float16" in awkward else 2e-6)


def test_heads_are_cut_first_and_then_what_each_of_them_has():
    model, _ = CASES["heads"]
    error, fewer, _ = cut_and_compare(model, {"wq": [1]})
    assert error < 1e-6
    error, fewer, channels = cut_and_compare(fewer, {"wq": [0, 2], "wv": [3]}, outer=False)
    assert error < 1e-6
    assert channels == {"wq": 2, "wv": 1}
    shapes = {tensor.name: list(tensor.dims) for tensor in fewer.graph.initializer}
    assert (shapes["wq"], shapes["wk"], shapes["wv"], shapes["wo"]) == ([8, 4], [8, 4], [8, 6], [6, 8])
