"""What passes share that cut a model down to a share of something: blocks to round to, gentler cuts, bytes that no single site has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnxshrink.contract import Change
from onnxshrink.errors import OptionError, must
from onnxshrink.numerics.simd import channel_block

__all__ = ["CLOSE", "block_of", "charged", "check_round", "gentler"]

CLOSE = 0.01  # of a target is close enough not to be mentioned
_GENTLEST = 0.97  # a cut that leaves more than this saves nothing worth having
_WEAKER = 0.75


def check_round(owner: str, text: str) -> None:
    """Checks an option that says what to round to.

    Raises:
        OptionError: it is neither auto, none nor a number from 1 to 1024.
    """
    if text not in ("auto", "none") and not (text.isdecimal() and 1 <= int(text) <= 1024):
        raise OptionError(must(owner, "round", "auto, none or a number from 1 to 1024", repr(text)))


def block_of(text: str, *, for_time: bool) -> int:
    """Returns what to round to: with auto the block of channels that this processor computes at a time, where time is to be saved.

    Args:
        text: auto, none or a number.
        for_time: bytes are saved by every channel, time is not.
    """
    if text == "auto":
        return channel_block() if for_time else 1
    return 1 if text == "none" else int(text)


def gentler(share: float) -> float | None:
    """Returns what is left after 3/4 of a cut, None where that is no longer worth having."""
    left = 1 - (1 - share) * _WEAKER
    return left if left <= _GENTLEST else None


def charged(changes: Sequence[Change], grown: int) -> list[Change]:
    """Returns changes whose bytes add up to those by which the model has grown: what belongs to all of them is the first one's.

    Args:
        changes: any number.
        grown: bytes after all of them less bytes before.
    """
    if not changes:
        return []
    others = grown - sum(change.bytes_after - change.bytes_before for change in changes)
    return [replace(changes[0], bytes_after=changes[0].bytes_after + others), *changes[1:]]
