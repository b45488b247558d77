"""Removes what the model does not need; the outputs stay what they are, up to float rounding of folded BatchNormalizations.

    unused      nodes and initializers that no output depends on
    identity    Identity, and Dropout in inference mode
    constant    nodes that read only constants, computed now when the result takes no more bytes than what it replaces
    batch norm  Conv or ConvTranspose followed by BatchNormalization:  W' = s·W,  b' = (b - mean)·s + B,  s = scale / sqrt(var + eps)
    duplicate   constants of one scope with the same type, shape and bytes become one
    notes       on request, the doc_strings and metadata_props of nodes, where exporters leave stack traces; the model's own stay
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from onnxshrink.contract import Change, Context, Pass, Report, Skip
from onnxshrink.graph.edit import (
    NameSource,
    constant_bytes,
    drop_constant,
    footprint,
    item_bytes,
    nodes_bytes,
    output_ids,
    remove_dead,
    replace_everywhere,
    replace_node,
    site_of,
)
from onnxshrink.graph.evaluate import EXACT_OPS, evaluate, is_computable, result_elements
from onnxshrink.graph.fusion import fold_batch_norm, obstacle_to_folding
from onnxshrink.graph.ir import Constant, Graph, Node, Scope
from onnxshrink.options import option

__all__ = ["Tidy"]

_NOTE_FIELDS = ("doc_string", "metadata_props")
_MANY_NOTES_BYTES = 10_000  # from here on people want to know


@dataclass(frozen=True, kw_only=True)
class Tidy(Pass):
    """Removes dead nodes and duplicates, folds constants where the file does not grow, folds Conv + BatchNorm."""

    name: ClassVar[str] = "tidy"
    fold_constants: bool = option(True, "compute nodes that read only constants", per_site=False)
    fold_batch_norm: bool = option(True, "fold BatchNormalization into the convolution before it", per_site=False)
    strip_notes: bool = option(False, "drop doc_strings and metadata_props of nodes, not of the model", per_site=False)

    def weaker(self) -> Self | None:
        """Returns the pass without the one rewrite that moves the outputs at all, by float rounding."""
        return replace(self, fold_batch_norm=False) if self.fold_batch_norm else None

    @property
    def sites_are_independent(self) -> bool:
        """Tidying one place depends on others; no rule restricts it."""
        return False

    def apply(self, graph: Graph, context: Context) -> Report:
        """Edits the graph in place; see the module for what is done, in that order."""
        listed = [tensor.name for tensor in graph.overridable]
        answers: list[Change | Skip] = [*_remove_unused(graph)]
        for scope in list(graph.scopes()):
            answers += _remove_identities(scope, graph)
            if self.fold_constants:
                answers += _fold_constants(scope, graph)
            if self.fold_batch_norm:
                answers += _fold_batch_norms(scope, graph)
            answers += _merge_duplicates(scope, graph)
        changes = [answer for answer in answers if isinstance(answer, Change)]
        notes_bytes = sum(_notes_bytes(node) for scope in graph.scopes() for node in scope.graph.nodes)
        if self.strip_notes and notes_bytes:
            changes += _strip_notes(graph)
        notes = []
        if notes_bytes > _MANY_NOTES_BYTES and not self.strip_notes:
            notes.append(f"exporter's notes on nodes take {notes_bytes} bytes; tidy:strip-notes=true drops them")
        left = {tensor.name for tensor in graph.inputs}
        notes += [f"'{name}' is no longer a graph input that callers can override" for name in listed if name not in left]
        skips = [answer for answer in answers if isinstance(answer, Skip)]
        return Report(_by_site(changes), skips, notes)


def _remove_unused(graph: Graph) -> Iterator[Change]:
    found = {
        id(item): (scope.address(site_of(item)), item_bytes(item, scope.graph))
        for scope in graph.scopes()
        for item in scope.graph.items
    }
    for item in remove_dead(graph):
        yield Change(*found[id(item)], 0, f"unused {item.op if isinstance(item, Node) else 'constant'} removed")


def _remove_identities(scope: Scope, graph: Graph) -> Iterator[Change]:
    outputs = output_ids(graph)
    for node in [node for node in scope.graph.nodes if _is_identity(node)]:
        if not any(id(tensor) in outputs for tensor in node.outputs):
            readers = list(node.outputs[0].outputs)  # their bytes change with the name of what they read
            before = nodes_bytes([node, *readers])
            replace_everywhere(scope.graph, node.outputs[0], node.inputs[0])
            gone = [item for item in remove_dead(graph, [node]) if item is not node]  # a Dropout's ratio
            before += sum(item_bytes(item, scope.graph) for item in gone)
            yield Change(scope.address(node.site), before, nodes_bytes(readers), f"{node.op} removed")


def _fold_constants(scope: Scope, graph: Graph) -> Iterator[Change | Skip]:
    outputs = output_ids(graph)
    for node in [node for node in scope.graph.nodes if node.op in EXACT_OPS]:
        if not is_computable(node):  # asked one by one: an earlier fold may have made the inputs constant
            continue
        site, before = scope.address(node.site), footprint([node], scope.graph, outputs)
        if any(tensor is output for tensor in node.outputs for output in graph.outputs):
            yield Skip(site, f"this {node.op} computes a graph output")
            continue
        if result_elements(node) > before:  # even at one byte an element; and a huge result is never computed
            yield Skip(site, f"folding this {node.op} would grow the file")
            continue
        folded = [
            Constant(tensor.name, values, tensor.info if id(tensor) in outputs else None)
            for tensor, values in evaluate(node, scope.graph)
        ]
        after = sum(constant_bytes(constant, scope.graph) for constant in folded)
        if after > before:
            yield Skip(site, f"folding this {node.op} would grow the file from {before} to {after} bytes")
            continue
        replace_node(scope.graph, graph, node, folded)
        yield Change(site, before, after, f"{node.op} of constants computed")


def _fold_batch_norms(scope: Scope, graph: Graph) -> Iterator[Change | Skip]:
    names, outputs = NameSource(graph), output_ids(graph)
    for node in [node for node in scope.graph.nodes if node.op == "BatchNormalization" and node.is_standard]:
        site, obstacle = scope.address(node.site), obstacle_to_folding(node, outputs)
        if obstacle is None and _has_overridable_parameters(node, scope.graph):
            obstacle = "callers can override its parameters, which are listed as graph inputs"
        if obstacle is not None:
            yield Skip(site, f"BatchNormalization stays: {obstacle}")
            continue
        conv = node.inputs[0].inputs[0]
        before = footprint([conv, node], scope.graph, outputs)
        fold_batch_norm(scope.graph, graph, node, names)
        yield Change(site, before, footprint([conv], scope.graph, outputs), f"BatchNormalization folded into {conv.op}")


def _merge_duplicates(scope: Scope, graph: Graph) -> Iterator[Change]:
    protected = output_ids(graph) | {id(tensor) for tensor in scope.graph.inputs}
    alike: dict[tuple[str, tuple[int, ...]], list[Constant]] = {}
    for constant in scope.graph.constants:
        if id(constant) not in protected and constant.dtype != object:
            alike.setdefault((constant.dtype.name, constant.shape), []).append(constant)
    for group in alike.values():
        kept: dict[bytes, Constant] = {}
        for constant in group if len(group) > 1 else []:
            twin = kept.setdefault(hashlib.blake2b(constant.values.tobytes()).digest(), constant)
            if twin is not constant:
                readers = list(constant.outputs)
                before = constant_bytes(constant, scope.graph) + nodes_bytes(readers)
                replace_everywhere(scope.graph, constant, twin)
                drop_constant(scope.graph, constant)
                yield Change(scope.address(constant.name), before, nodes_bytes(readers), f"same as {twin.name}")


def _strip_notes(graph: Graph) -> Iterator[Change]:
    for scope in graph.scopes():
        before = nodes_bytes(scope.graph.nodes)
        for node in scope.graph.nodes:
            if node.residue is not None:
                for field in _NOTE_FIELDS:
                    node.residue.ClearField(field)
        yield Change(scope.path or graph.name or "graph", before, nodes_bytes(scope.graph.nodes), "notes on nodes dropped")


def _notes_bytes(node: Node) -> int:
    if node.residue is None:
        return 0
    return len(node.residue.doc_string.encode()) + sum(entry.ByteSize() for entry in node.residue.metadata_props)


def _by_site(changes: Iterable[Change]) -> list[Change]:
    """Returns one change for each site, which says all that was done to it."""
    merged: dict[str, Change] = {}
    for change in changes:
        if (first := merged.get(change.site)) is not None:
            before, after = first.bytes_before + change.bytes_before, first.bytes_after + change.bytes_after
            change = Change(change.site, before, after, f"{first.detail}; {change.detail}")
        merged[change.site] = change
    return list(merged.values())


def _has_overridable_parameters(norm: Node, scope: Graph) -> bool:
    return any(tensor in scope.overridable for tensor in [*norm.inputs[1:], *norm.inputs[0].inputs[0].inputs[1:]])


def _is_identity(node: Node) -> bool:
    """Whether a node hands its first input on: Identity, or Dropout without training and without a mask that is read."""
    if not node.is_standard or len([tensor for tensor in node.outputs if tensor.name and tensor.outputs]) > 1:
        return False
    training = node.inputs[2] if len(node.inputs) > 2 else None  # an input since opset 12; never on before opset 7
    return node.op == "Identity" or (
        node.op == "Dropout"
        and (training is None or not training.name or (isinstance(training, Constant) and not training.values.any()))
        and not any(mask.outputs for mask in node.outputs[1:])
    )
