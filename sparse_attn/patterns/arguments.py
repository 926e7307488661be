"""Checks of what patterns are made of."""

from __future__ import annotations

import math
import operator

#: Stands for an unbounded side of a window.
INFINITE = 2**63 - 1

#: Of what there is one tensor row each, such as buckets and rounds of hashing.
MOST = 2**31 - 1


def index(name: str, value: object, least: int, most: int | None = None) -> int:
    """`value` as an int of at least `least` and at most `most`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"sparse_attn: expected {name} to be an int, got {value!r}") from None
    if number < least:
        raise ValueError(f"sparse_attn: expected {name} to be at least {least}, got {number}")
    if most is not None and number > most:
        raise ValueError(f"sparse_attn: expected {name} to be at most {most}, got {number}")
    return number


def check_sizes(n_q: object, n_k: object) -> tuple[int, int]:
    """Numbers of queries and keys; as many keys as queries if None."""
    queries = index("n_q", n_q, 0)
    return queries, queries if n_k is None else index("n_k", n_k, 0)


def side(name: str, value: object) -> int | float:
    """One side of a window: an int of at least 0, or math.inf."""
    if isinstance(value, float) and value == math.inf:
        return math.inf
    return index(name, value, 0)


def seed(value: object) -> int:
    """A seed: any 64-bit int."""
    return index("seed", value, -(2**63), 2**63 - 1)


def wrap_seed(value: int) -> int:
    """The seed that equals an int of any size modulo 2⁶⁴."""
    return (value + 2**63) % 2**64 - 2**63


def word(value: int | float) -> int:
    """An int of any size as one of 64 bits; larger ones count as unbounded."""
    return INFINITE if value == math.inf else min(int(value), INFINITE)
