"""The table of channel rules: which op passes channels on in which way.

A rule is a small function that ties positions of a node's axes together, and pins those that must stay (`Site`); where attributes or
inputs hold sizes, a second one says what they become after a cut. An op without a rule is a barrier: nothing that it reads or
computes is cut. Third parties add rules for their ops with `register_rule`.
"""

from __future__ import annotations

from onnxshrink.graph.channel_rules_linear import RULES as LINEAR
from onnxshrink.graph.channel_rules_moves import RULES as MOVES
from onnxshrink.graph.channel_rules_places import RULES as PLACES
from onnxshrink.graph.channel_rules_pointwise import RULES as POINTWISE
from onnxshrink.graph.channel_sites import Rule
from onnxshrink.graph.ir import Node

__all__ = ["register_rule", "rule_of", "ruled_ops"]

_RULES: dict[tuple[str, str], Rule] = {("", op): rule for op, rule in (LINEAR | MOVES | PLACES | POINTWISE).items()}


def register_rule(op: str, rule: Rule, domain: str = "") -> None:
    """Gives an op a rule; the last one given counts.

    Args:
        op: its type.
        rule: what it does with channels.
        domain: e.g. ``com.microsoft``; empty or ``ai.onnx`` for the ONNX standard.

    >>> register_rule("Negate", Rule(lambda site: site.broadcast(site.node.inputs, site.node.outputs[0])), "my.domain")
    """
    _RULES["" if domain == "ai.onnx" else domain, op] = rule


def rule_of(node: Node) -> Rule | None:
    """Returns the rule of a node's op, None if there is none."""
    return _RULES.get(("" if node.is_standard else node.domain or "", node.op))


def ruled_ops() -> list[str]:
    """Returns the standard's ops that have a rule, sorted."""
    return sorted(op for domain, op in _RULES if not domain)
