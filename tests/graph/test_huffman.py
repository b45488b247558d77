"""The Huffman decoder as ONNX Runtime runs it: the right codes at every opset, and nothing of it left after folding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxshrink.api import compress, expand
from onnxshrink.errors import ModelReadError
from onnxshrink.graph.edit import NameSource
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.huffman import Decoder, has_decoder, pieces, remove_decoder
from onnxshrink.graph.huffman_decoder import DOMAIN, DecoderShape, decoder_functions
from onnxshrink.graph.ir import Graph, Node, Variable
from onnxshrink.numerics.huffman_batch import encode
from onnxshrink.numerics.huffman_plan import Part, Sequenced
from onnxshrink.passes.huffman import Huffman
from onnxshrink.passes.share_weights import ShareWeights
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
OPSETS = range(11, 27)


def codes(seed: int, size: int, spread: float) -> Array:
    return np.clip(np.rint(np.random.default_rng(seed).standard_normal(size) * spread), -128, 127).astype(np.int8)


def batches_of(
    vectors: list[Array], count: int, lane_bytes: int = 24, kinds: tuple[Any, ...] = ("single", "runs"), shortest: int = 1
) -> list[list[Sequenced]]:
    """Puts vectors in batches in turn, a sequence each, and the last two of all in one sequence."""
    batches: list[list[Sequenced]] = [[] for _ in range(count)]
    for index, vector in enumerate(vectors[:-2]):
        coded = encode(vector, lane_bytes, kinds[index % len(kinds)], shortest)
        batches[index % count].append(Sequenced(coded, (Part(index, 0, vector.size),)))
    last = (len(vectors) - 2, len(vectors) - 1)
    coded = encode(np.concatenate(vectors[-2:]), lane_bytes, "single", shortest)
    batches[-1].append(Sequenced(coded, tuple(Part(index, 0, vectors[index].size) for index in last)))
    return batches


def empty(opset: int) -> Graph:
    """Returns a graph of no nodes."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = onnx.GraphProto(name="g", input=[value], output=[value])
    graph = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7))
    graph.outputs = []
    return graph


def decoding(opset: int, vectors: list[Array], batches: list[list[Sequenced]]) -> Graph:
    """Returns a graph whose outputs are the codes times x, in float32."""
    graph = empty(opset)
    decoder = Decoder(opset, NameSource(graph), batches)
    decoder.insert(graph)
    for part, vector in sorted(decoder.outputs, key=lambda output: output[0].vector):
        wide, product = (Variable(f"{stem}{part.vector}") for stem in ("f", "y"))
        product.dtype, product.shape = np.dtype(np.float32), vectors[part.vector].shape
        graph.nodes.append(Node("Cast", [vector], [wide], {"to": TensorProto.FLOAT}))
        graph.nodes.append(Node("Mul", [wide, graph.inputs[0]], [product]))
        graph.outputs.append(product)
    return graph


def assert_decodes(graph: Graph, vectors: list[Array], tmp_path: Path, *, level: str = "all") -> None:
    """Whether ONNX Runtime computes the codes, with no node but one Mul an output left, and the checker has no complaint."""
    import onnxruntime

    model = to_model(graph)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    running = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for found, vector in zip(running.run(None, {"x": np.ones(1, np.float32)}), vectors, strict=True):
        assert np.array_equal(found, vector.astype(np.float32))
    left = onnx.load(tmp_path / "optimized.onnx")
    assert [node.op_type for node in left.graph.node] == ["Mul"] * len(vectors)
    assert not left.functions


VECTORS = [codes(0, 700, 5.0), codes(1, 300, 0.3), codes(2, 41, 40.0), codes(3, 99, 5.0)]


class TestOnnxRuntime:
    @pytest.mark.parametrize("opset", OPSETS)
    @pytest.mark.parametrize("count", [1, 2])
    def test_decodes_at_every_opset_and_nothing_is_left(self, tmp_path: Path, opset: int, count: int) -> None:
        assert_decodes(decoding(opset, VECTORS, batches_of(VECTORS, count)), VECTORS, tmp_path)

    @pytest.mark.parametrize("level", ["basic", "extended"])
    def test_at_other_levels_of_optimization(self, tmp_path: Path, level: str) -> None:
        assert_decodes(decoding(17, VECTORS, batches_of(VECTORS, 2)), VECTORS, tmp_path, level=level)

    @pytest.mark.parametrize("count", [3, 9])
    def test_as_many_batches_as_there_may_be(self, tmp_path: Path, count: int) -> None:
        vectors = [codes(seed, 200 + 31 * seed, 3.0) for seed in range(11)]
        assert_decodes(decoding(17, vectors, batches_of(vectors, count)), vectors, tmp_path)

    @pytest.mark.parametrize("lane_bytes", [8, 16, 128])
    @pytest.mark.parametrize("shortest", [1, 3, 8])
    def test_lanes_and_slots_of_all_sizes(self, tmp_path: Path, lane_bytes: int, shortest: int) -> None:
        batches = batches_of(VECTORS, 1, lane_bytes, ("single",), shortest)
        assert_decodes(decoding(18, VECTORS, batches), VECTORS, tmp_path)

    @pytest.mark.parametrize("kind", ["single", "runs"])
    def test_vectors_of_one_code_and_of_one_element(self, tmp_path: Path, kind: Any) -> None:
        vectors = [np.zeros(300, np.int8), np.full(77, -128, np.int8), codes(0, 1, 5.0), codes(1, 1, 5.0)]
        assert_decodes(decoding(13, vectors, batches_of(vectors, 1, kinds=(kind,))), vectors, tmp_path)

    def test_batches_wait_for_each_other(self, tmp_path: Path) -> None:
        """Each step of constant folding decodes one batch: that is what keeps the memory down."""
        graph = decoding(17, VECTORS, batches_of(VECTORS, 3))
        (tmp_path / "m.onnx").write_bytes(to_model(graph).SerializeToString())
        program = (
            "import sys, onnxruntime as ort; o = ort.SessionOptions(); o.log_severity_level = 0;"
            "ort.InferenceSession(sys.argv[1], o, providers=['CPUExecutionProvider'])"
        )
        steps = folding_steps(program, tmp_path / "m.onnx")
        assert steps == 3


def folding_steps(program: str, path: Path) -> int:
    """Returns how many steps of ONNX Runtime's constant folding changed the graph, by its log."""
    import subprocess
    import sys

    run = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    return run.stderr.count("GraphTransformer ConstantFolding modified: 1")


class TestFile:
    def test_bytes_are_those_of_the_file_and_the_functions_are_small(self) -> None:
        for opset in (11, 17):
            graph = empty(opset)
            before = to_model(graph).ByteSize()
            decoder = Decoder(opset, NameSource(graph), batches_of(VECTORS, 2, 64, shortest=3))
            decoder.insert(graph)
            assert to_model(graph).ByteSize() - before == pytest.approx(decoder.nbytes, abs=8)
            assert sum(function.ByteSize() for function in decoder.functions) < 6000

    def test_the_same_codes_give_the_same_bytes(self) -> None:
        first, second = (
            to_model(decoding(17, VECTORS, batches_of(VECTORS, 2))).SerializeToString(deterministic=True) for _ in range(2)
        )
        assert first == second

    def test_only_standard_ops_of_the_models_opset(self) -> None:
        for opset in OPSETS:
            for function in decoder_functions(DecoderShape(opset, 64, 2, True, True)):
                assert {entry.domain: entry.version for entry in function.opset_import}[""] == opset
                assert {node.domain for node in function.node} <= {"", DOMAIN}

    def test_ir_version_and_import_are_raised_and_taken_back(self) -> None:
        graph = decoding(17, VECTORS, batches_of(VECTORS, 1))
        assert to_model(graph).ir_version == 8
        assert has_decoder(graph)
        remove_decoder(graph)
        assert has_decoder(graph), "while it is called"
        graph.nodes, graph.outputs = [], []
        remove_decoder(graph)
        assert not has_decoder(graph)
        assert [entry.domain for entry in to_model(graph).opset_import] == [""]


class TestReading:
    @pytest.mark.parametrize("opset", [11, 13])
    @pytest.mark.parametrize("count", [1, 2])
    def test_numpy_finds_the_same_codes(self, opset: int, count: int) -> None:
        graph = load(to_model(decoding(opset, VECTORS, batches_of(VECTORS, count))))
        found = {piece.tensor.name: piece for piece in pieces(graph).values()}
        for index, vector in enumerate(VECTORS):
            (cast,) = [node for node in graph.nodes if node.outputs[0].name == f"f{index}"]
            assert found[cast.inputs[0].name].values().tolist() == vector.tolist()
        message = to_model(graph).graph
        calls = [node for node in message.node if node.op_type in ("Huffman", "Split")]
        total = sum(item.ByteSize() for item in [*calls, *message.initializer])
        assert sum(piece.nbytes for piece in found.values()) == pytest.approx(total, rel=0.05)

    @pytest.mark.parametrize("opset", [11, 13])
    def test_damaged_data_is_one_line_of_error(self, opset: int) -> None:
        graph = decoding(opset, VECTORS, batches_of(VECTORS, 1))
        for index in range(len(graph.constants)):
            copy = graph.copy()
            constant = copy.constants[index]
            constant.values = constant.values[: constant.size // 2]
            errors = []
            for piece in pieces(copy).values():
                try:
                    piece.values()
                except ModelReadError as error:
                    errors.append(str(error))
            split_sizes = opset > 11 and index == len(graph.constants) - 1
            assert errors or (split_sizes and not pieces(copy))
            assert not any("\n" in error for error in errors)

    def test_models_without_a_decoder_have_no_pieces(self) -> None:
        nodes = [helper.make_node("Split", ["x"], ["y", "z"], num_outputs=2)]
        model = oracle.make_model(
            nodes,
            [oracle.tensor("x", [4])],
            [oracle.tensor("y", [2]), oracle.tensor("z", [2])],
            [],
            opset=18,
        )
        assert pieces(load(model)) == {}


class TestDamage:
    def coded(self) -> onnx.ModelProto:
        rng = np.random.default_rng(3)
        value = oracle.value("w", rng.standard_normal((400, 400)).astype(np.float32))
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        model = oracle.make_model([node], [oracle.tensor("x", ["n", 400])], [oracle.tensor("y", ["n", 400])], [value])
        return compress(model, [ShareWeights(step=0.5), Huffman()]).to_model()

    def test_a_flipped_bit_is_noticed_wherever_it_is(self) -> None:
        model = self.coded()
        (data,) = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.UINT8]
        raw = bytearray(data.raw_data)
        for position in range(0, len(raw), len(raw) // 25):
            raw[position] ^= 4
            data.raw_data = bytes(raw)
            with pytest.raises(ModelReadError, match="the file is damaged"):
                expand(model)
            raw[position] ^= 4

    def test_another_version_is_refused(self) -> None:
        model = self.coded()
        for entry in model.opset_import:
            entry.version = 2 if entry.domain == "onnxshrink" else entry.version
        with pytest.raises(ModelReadError, match="version 1, got 2"):
            expand(model)

    def test_codes_beyond_the_codebook_are_refused(self) -> None:
        codes = oracle.value("w.codes", np.full((8, 8), 5, np.uint8))
        book = oracle.value("w.codebook", np.zeros(4, np.float32))
        nodes = [
            helper.make_node("Cast", ["w.codes"], ["index"], to=onnx.TensorProto.INT32),
            helper.make_node("Gather", ["w.codebook", "index"], ["w"]),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ]
        model = oracle.make_model(nodes, [oracle.tensor("x", ["n", 8])], [oracle.tensor("y", ["n", 8])], [codes, book])
        with pytest.raises(ModelReadError, match="tensor 'w': its codes cannot be decoded"):
            expand(model)
