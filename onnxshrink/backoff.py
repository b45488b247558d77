"""Which sites to leave alone when a pass moves the outputs too far as a whole.

A handful of layers often causes most of the error. Each changed site is rewritten by itself once and the error of the outputs
measured. Errors of different layers are nearly uncorrelated, so their squares add up:

    drift² of a set of sites ≈ Σ drift² of each

and the set that saves most bytes within a budget of drift² is, greedily, all sites but those with the greatest drift² per byte
saved (the fractional knapsack of Dantzig 1957). The caller validates the result as a whole and comes back with a smaller budget if
the estimate was too kind.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from onnxshrink.contract import Change, Rule, Step

__all__ = ["SiteError", "only", "probe", "without", "worst_per_byte"]


@dataclass(frozen=True)
class SiteError:
    """What rewriting one site alone does: squared drift of the worst output, and bytes saved (at least 1)."""

    site: str
    squared_drift: float
    bytes_saved: int


def only(step: Step, site: str) -> Step:
    """Returns the step restricted to one site."""
    return Step(step.run, [*step.rules, Rule("*", skip=True), Rule(glob.escape(site), skip=False)])


def without(step: Step, sites: Sequence[str]) -> Step:
    """Returns the step with some sites spared: treated as gently as the pass can, or left alone."""
    options = step.run.spared()
    rules = (Rule(glob.escape(site), options or {}, skip=True if options is None else None) for site in sites)
    return Step(step.run, [*step.rules, *rules])


def probe(changes: Sequence[Change], drift_of: Callable[[str], float | None]) -> list[SiteError]:
    """Returns the error of each changed site by itself.

    Args:
        changes: what the whole pass changed.
        drift_of: applies the pass to one site and returns the drift of the worst output, None if that fails.
    """
    found = []
    for change in changes:
        drift = drift_of(change.site)
        squared = float("inf") if drift is None else drift * drift
        found.append(SiteError(change.site, squared, max(1, change.bytes_before - change.bytes_after)))
    return found


def worst_per_byte(errors: Sequence[SiteError], budget: float) -> list[str]:
    """Returns the sites to leave alone so that the squared drifts of the rest sum to at most ``budget``, worst first."""
    ordered = sorted(errors, key=lambda error: (-error.squared_drift / error.bytes_saved, error.site))
    return [error.site for error in _spared(ordered, budget)]


def _spared(ordered: Sequence[SiteError], budget: float) -> Iterator[SiteError]:
    for index, error in enumerate(ordered):
        if math.fsum(rest.squared_drift for rest in ordered[index:]) <= budget:  # anew: infinities do not subtract
            return
        yield error
