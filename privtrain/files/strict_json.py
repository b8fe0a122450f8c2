"""JSON that every reader understands alike: no key twice, no NaN or infinity, no number beyond a double.

Sealed and signed files are read through here: a digest over bytes is worth nothing if two readers see two contents.

No message quotes what is read: private records pass through here too.
"""

from __future__ import annotations

import json
import math
from typing import Any


class RepeatedKeyError(ValueError):
    """An object that names a key twice, and so has two meanings."""


def loads(text: str | bytes) -> Any:
    """Return the value of JSON text in which no object names a key twice and every number is finite.

    Raises:
        ValueError: if it is no such JSON.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_small_int,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def dumps(value: Any) -> str:
    """Return the one form in which records are written: ASCII, no spaces, keys in the order given."""
    return json.dumps(value, separators=(",", ":"))


def _finite_float(text: str) -> float:
    """Return a number as JSON writes it; ``ValueError`` where no double holds it, as of 1e999."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is beyond the range of a double")
    return value


def _small_int(text: str) -> int:
    """Return a whole number of JSON; ``ValueError`` where it is beyond any double, which has up to 309 digits."""
    # Checked by length first: Python raises an error of its own at 4,300 digits.
    if len(text) > 300:
        raise ValueError("a whole number is beyond the range of a double")
    return int(text)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of these pairs; ``json.loads`` alone would let the last of two values win.

    Raises:
        RepeatedKeyError: if a key stands twice.
    """
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise RepeatedKeyError("an object names a key twice")
    return mapping


def _refuse_constant(_: str) -> Any:
    raise ValueError("NaN and infinity are no numbers of JSON")
