"""What channels are worth, against sums over filters and least squares on ONNX Runtime's own activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxshrink.calibrate import Calibration
from onnxshrink.contract import Context
from onnxshrink.graph.channel_groups import find_channels
from onnxshrink.graph.channel_readers import Candidate, candidates
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.importance import CHANNEL_CRITERIA, channel_scores
from onnxshrink.inputs import Feeds, Samples
from tests import oracle
from tests.graph.test_channel_rules import CASES, C, N, S, between, build, linear, positive

Array = np.ndarray[Any, np.dtype[Any]]
DATA_FREE = tuple(criterion for criterion in CHANNEL_CRITERIA if criterion not in ("reconstruction", "activation"))


def feeds_of(count: int, *shape: int) -> list[Feeds]:
    return [{"x": np.random.default_rng([index, *shape]).standard_normal(shape).astype(np.float32)} for index in range(count)]


def context_of(feeds: Sequence[Feeds] | None, **more: Any) -> Context:
    data = Calibration(Samples(lambda index: feeds[index], range(len(feeds)), "test"), threads=1) if feeds else None
    return Context(activations=data, **more)


def found(model: Any, *, outer: bool = True) -> tuple[Graph, list[Candidate]]:
    graph = load(model)
    return graph, candidates(graph, [group for group in find_channels(graph, outer=outer).groups if group.reason is None])


def scores(model: Any, criterion: Any, feeds: Sequence[Feeds] | None = None, **more: Any) -> list[Array]:
    return channel_scores(*found(model), criterion, context_of(feeds, **more))


def constants(model: Any) -> dict[str, Array]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float64) for tensor in model.graph.initializer}


def values_of(model: Any, name: str, feeds: Sequence[Feeds]) -> Array:
    """Returns the values of a tensor for all samples, by ONNX Runtime."""
    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    asked.graph.output.append(onnx.ValueInfoProto(name=name))
    running = oracle.session(asked, optimise=False)
    return np.concatenate([oracle.run(running, one)[1] for one in feeds]).astype(np.float64)


def shares(amounts: Array) -> Array:
    return amounts / amounts.sum()


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_norms_are_shares_of_what_computes_and_of_what_reads_a_channel(criterion: str) -> None:
    model = between("Relu h -> r")
    held, power = constants(model), 1 if criterion == "l1" else 2
    computes = shares((np.abs(held["w1"]) ** power).reshape(C, -1).sum(axis=1))
    reads = shares((np.abs(held["w2"]) ** power).sum(axis=(0, 2, 3)))
    np.testing.assert_allclose(scores(model, criterion)[0], (computes + reads) / 2, rtol=1e-6)


def test_all_members_of_a_group_have_a_say() -> None:
    model, _ = CASES["residual sum"]
    held = constants(model)
    parts = [(held["w1"] ** 2).sum(axis=(1, 2, 3)), (held["wa"] ** 2).sum(axis=(1, 2, 3)), (held["wa"] ** 2).sum(axis=(0, 2, 3)), (held["w2"] ** 2).sum(axis=(0, 2, 3))]
    np.testing.assert_allclose(scores(model, "l2")[0], np.mean([shares(part) for part in parts], axis=0), rtol=1e-6)


def test_fpgm_looks_at_what_computes_a_channel_alone() -> None:
    model = between("Relu h -> r")
    filters = constants(model)["w1"].reshape(C, -1)
    distances = np.array([sum(np.linalg.norm(one - other) for other in filters) for one in filters])
    np.testing.assert_allclose(scores(model, "fpgm")[0], shares(distances), rtol=1e-6)


def test_lamp_is_the_mean_of_the_layers() -> None:
    model = between("Relu h -> r")
    held, parts = constants(model), []
    for squares in ((held["w1"] ** 2).reshape(C, -1).sum(axis=1), (held["w2"] ** 2).sum(axis=(0, 2, 3))):
        parts.append([square / squares[squares >= square].sum() for square in squares])
    np.testing.assert_allclose(scores(model, "lamp")[0], np.mean(parts, axis=0), rtol=1e-6)


def test_channels_that_lie_on_many_places_are_counted_with_all_of_them() -> None:
    model, _ = CASES["Flatten"]
    held = constants(model)
    computes, reads = shares((held["w1"] ** 2).reshape(C, -1).sum(axis=1)), shares((held["w2"] ** 2).reshape(6, C, -1).sum(axis=(0, 2)))
    np.testing.assert_allclose(scores(model, "l2")[0], (computes + reads) / 2, rtol=1e-6)


def test_a_channel_with_fewer_places_than_others_is_worth_less() -> None:
    """Channel 3 is looked up twice."""
    model, _ = CASES["Gather, twice the same"]
    graph, candidates_ = found(model)
    held = constants(model)
    chosen = channel_scores(graph, candidates_, "l2", Context())[[one.group.size for one in candidates_].index(3)]
    computes = shares((held["w1"] ** 2).reshape(C, -1).sum(axis=1)[[0, 3, 7]])
    each = (held["w2"] ** 2).sum(axis=(0, 2, 3))  # of 3, 3, 7, 0
    np.testing.assert_allclose(chosen, (computes + shares(np.array([each[3], each[0] + each[1], each[2]]))) / 2, rtol=1e-6)


def test_scales_of_normalizations() -> None:
    model = between("BatchNormalization h s c m v -> a", "Relu a -> r", s=(C,), c=(C,), m=(C,), v=positive())
    np.testing.assert_allclose(scores(model, "bn-scale")[0], shares(np.abs(constants(model)["s"])), rtol=1e-6)
    plain = between("Relu h -> r")
    np.testing.assert_array_equal(scores(plain, "bn-scale")[0], scores(plain, "l2")[0])


def test_a_scale_of_two_groups_is_divided() -> None:
    model = between("Conv x wa -> a", ("Concat h a -> b", {"axis": 1}), "BatchNormalization b s c m v -> r", channels=C + 5,
                    wa=(5, 4, 1, 1), s=(C + 5,), c=(C + 5,), m=(C + 5,), v=positive(C + 5))  # fmt: skip
    first, second = scores(model, "bn-scale")
    scale = np.abs(constants(model)["s"])
    np.testing.assert_allclose(first, shares(scale[:C]), rtol=1e-6)
    np.testing.assert_allclose(second, shares(scale[C:]), rtol=1e-6)


def test_random_scores_depend_on_the_seed_and_the_group() -> None:
    model = linear("MatMul h wa -> r", width=C, wa=(C, C))
    one, same, other = (scores(model, "random", seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (np.array(one) != np.array(other)).all()
    assert (one[0] != one[1]).all()


def test_energies_are_those_of_the_activations() -> None:
    model, feeds = between("Relu h -> r"), feeds_of(6, N, 4, S, S)
    images = values_of(model, "r", feeds)
    patches = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(2, 3))  # what the second convolution meets
    each = np.square(patches).sum(axis=(0, 2, 3))  # [channels, 3, 3]
    each = each + each.sum() / (images.shape[0] * 9)  # few positions: as `Gram.shrunk` says
    np.testing.assert_allclose(scores(model, "activation", feeds)[0], shares(each.sum(axis=(1, 2))), rtol=1e-4)


def test_a_score_by_reconstruction_is_what_least_squares_cannot_explain() -> None:
    """The least missed channel is the one without which the readers' outputs are nearest, all others being free."""
    model, feeds = linear("Relu h -> r"), feeds_of(60, N, S, 4)
    rows, matrix = values_of(model, "r", feeds).reshape(-1, C), constants(model)["w2"]
    total = np.square(rows).sum()
    rows = np.concatenate([rows, np.sqrt(total / len(rows)) * np.eye(C)])  # few positions: as `Gram.shrunk` says
    energy = np.square(rows @ matrix).sum()
    rows = np.concatenate([rows, np.sqrt(1e-3 * np.square(rows).sum() / C) * np.eye(C)])  # and as `eliminate` damps
    errors = []
    for channel in range(C):
        others = np.delete(rows, channel, axis=1)
        best = np.linalg.lstsq(others, rows @ matrix, rcond=None)[0]
        errors.append(np.square(others @ best - rows @ matrix).sum() / energy)
    (found_scores,) = scores(model, "reconstruction", feeds)
    assert np.argmin(found_scores) == np.argmin(errors)
    assert found_scores.min() == pytest.approx(min(errors), rel=1e-4)
    assert found_scores.min() > 0


def test_scores_by_reconstruction_add_up_over_readers() -> None:
    both = linear("Relu h -> r", "MatMul r wa -> a", "ReduceSum a -> b", wa=(C, 6))
    both.graph.output.append(oracle.tensor("b", None))
    feeds = feeds_of(20, N, S, 4)
    parts = []
    for name in ("w2", "wa"):
        graph, (candidate, *_) = found(both)
        only = Candidate(candidate.group, tuple(reader for reader in candidate.readers if reader.weight.site == name))
        parts.append(channel_scores(graph, [only], "reconstruction", context_of(feeds))[0])
    np.testing.assert_allclose(scores(both, "reconstruction", feeds)[0], parts[0] + parts[1], rtol=1e-9)


def test_a_channel_that_is_always_zero_goes_first() -> None:
    model, feeds = linear("Add h b -> a", "Relu a -> r", b=np.where(np.arange(C) == 7, -1e3, 0.0).astype(np.float32)), feeds_of(9, N, S, 4)
    for criterion in ("reconstruction", "activation"):
        assert np.argmin(scores(model, criterion, feeds)[0]) == 7


def test_without_data_l2_stands_in_for_energy() -> None:
    model = between("Relu h -> r")
    np.testing.assert_array_equal(scores(model, "activation")[0], scores(model, "l2")[0])


def test_without_data_weights_tell_what_is_missed() -> None:
    """Of two channels that are computed by equal filters one is missed less than before: the other takes over."""
    model = between("Relu h -> r")
    before = scores(model, "reconstruction")[0]
    kernel = numpy_helper.to_array(model.graph.initializer[0]).copy()
    kernel[3] = kernel[5]
    model.graph.initializer[0].CopyFrom(oracle.value("w1", kernel))
    found = scores(model, "reconstruction")[0]
    assert min(found[3], found[5]) < min(before[3], before[5])


QUERIES = [
    "MatMul x wq -> q", "MatMul x wk -> k", ("Transpose k -> kt", {"perm": [0, 2, 1]}), "MatMul q kt -> a", ("Softmax a -> p", {"axis": -1}),
    "MatMul p x -> o", "MatMul o wo -> y",
]  # fmt: skip


@pytest.mark.parametrize("criterion", ["reconstruction", "activation"])
def test_a_group_that_no_weight_reads_is_not_for_free(criterion: str) -> None:
    """Queries meet keys: no weight sums over their channels, and what the outputs miss without them is not nothing."""
    model = build(QUERIES, (N, S, 4), wq=(4, C), wk=(4, C), wo=(4, 6))
    graph, candidates_ = found(model)
    assert [one.group.name for one in candidates_ if not one.readers] == ["wq"]
    every = channel_scores(graph, candidates_, criterion, context_of(feeds_of(6, N, S, 4)))
    assert every[[one.group.name for one in candidates_].index("wq")].min() > 0


@pytest.mark.parametrize("case", ["residual sum", "Concat", "Conv in groups", "heads", "LSTM forward", "squeeze and excite", "embedding"])
@pytest.mark.parametrize("criterion", DATA_FREE)
def test_every_group_has_scores(case: str, criterion: Any) -> None:
    graph, candidates_ = found(CASES[case][0])
    every = channel_scores(graph, candidates_, criterion, Context())
    for candidate, found_scores in zip(candidates_, every, strict=True):
        assert found_scores.shape == (candidate.group.size,)
        assert found_scores.dtype == np.float64
        assert (found_scores >= 0).all()
        if criterion not in ("lamp", "random"):
            assert found_scores.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("case", ["residual sum", "Concat", "Conv in groups", "LSTM forward"])
def test_energies_of_a_group_add_up_to_1(case: str) -> None:
    model, _ = CASES[case]
    shape = (S, N, 4) if "LSTM" in case else (N, 4, S, S)
    for found_scores in scores(model, "activation", feeds_of(6, *shape)):
        assert found_scores.sum() == pytest.approx(1.0)


def test_no_groups_no_scores() -> None:
    graph, _ = found(linear("Relu h -> r"))
    for criterion in CHANNEL_CRITERIA:
        assert channel_scores(graph, [], criterion, context_of(feeds_of(2, N, S, 4))) == []  # type: ignore[arg-type]
