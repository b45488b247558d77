"""Puts pieces in the place of weights, factored in turn: each makes up for those before. What is dequantized is cut as what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from onnxshrink.contract import Change, Context
from onnxshrink.factor_options import Option
from onnxshrink.factorization import factor_in_turn
from onnxshrink.graph.dequantized import is_dequantized, obstacle, store_dequantized
from onnxshrink.graph.edit import constant_bytes, nodes_bytes, set_values
from onnxshrink.graph.factoring import split
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.shares import charged

__all__ = ["cut_in_turn"]


def cut_in_turn(graph: Graph, chosen: Mapping[str, Option], context: Context) -> tuple[list[Change], set[str]]:
    """Factors weights in turn and puts the pieces in their place.

    Args:
        graph: the main graph.
        chosen: by site, an option with a form, of a weight of the graph or of its `dequantized_copy`.
        context: with activations where layers are to make up for those before them.

    Returns:
        A change for each, and the sites of what moved or went with them as well: biases, scales.

    Raises:
        ValidationError: the model does not run on the calibration inputs, or an activation is not finite.
    """
    if not chosen:
        return [], set()
    before, every = _bytes(graph), weights(graph)
    stored = {weight.site: constant_bytes(weight.constant, graph) for weight in every}
    store_dequantized(graph, [weight for weight in every if weight.site in chosen] + _split_biases(graph, chosen, every))
    targets = [weight for weight in weights(graph) if weight.site in chosen]
    pieces, repaired = factor_in_turn(graph, chosen, targets, context)
    for constant, values in repaired.biases.values():
        set_values(constant, values)
    touched = {id(constant) for constant, _ in repaired.biases.values()}
    moved = {weight.site for weight in weights(graph) if id(weight.constant) in touched}
    changes = []
    for weight in targets:
        form, ranks = chosen[weight.site].form, chosen[weight.site].ranks
        assert form is not None
        nodes = nodes_bytes([use.node for use in weight.uses if use.node is not None])
        made = split(graph, replace(form, weight=weight), pieces[weight.site])
        after = sum(constant_bytes(constant, graph) for constant in made.constants) + nodes_bytes(made.nodes) - nodes
        least = "its outputs lose least" if weight.site in repaired.sites else "it loses least itself"
        detail = f"{form.name}, rank {' x '.join(map(str, ranks))} of {' x '.join(map(str, form.full))}, as {least}"
        changes.append(Change(weight.site, stored[weight.site], after, detail))
    moved |= stored.keys() - {weight.site for weight in weights(graph)}
    return charged(changes, _bytes(graph) - before), moved  # what is left: scales, biases


def _split_biases(graph: Graph, chosen: Mapping[str, Option], every: Sequence[Weight]) -> list[Weight]:
    """Returns the biases behind DequantizeLinear of layers whose outputs will come of several nodes."""
    joined = {site for site, one in chosen.items() if one.form is not None and one.form.kind == "interpolative"}
    layers = {id(use.node) for weight in every if weight.site in joined for use in weight.uses}
    biases = [weight for weight in every if any(id(use.node) in layers and use.operand == 2 for use in weight.uses)]
    return [weight for weight in biases if is_dequantized(weight) and obstacle(graph, weight) is None]


def _bytes(graph: Graph) -> int:
    return nodes_bytes(graph.nodes) + sum(constant_bytes(constant, graph) for constant in graph.constants)
