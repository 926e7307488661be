"""What identifies an entry of a CPU result, and who is who in it."""

from __future__ import annotations

OURS = "sparse_attn"
LOOPS = ("chunk_loop", "chunk_loop_tuned")
DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = ("forward", "forward_backward")
TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
#: Everything that a time depends on, beside the peer and the direction.
PROBLEM = ("case", "length", "head_dim", "heads", "dtype", "threads")
USUAL_LENGTH = 4096


def name_of(row: dict) -> str:
    """The case with its length, where that is not the usual one."""
    length = row["length"]
    return row["case"] if length == USUAL_LENGTH else f"{row['case']}_n{length}"


def by_problem(rows: list[dict]) -> dict[tuple, dict[str, dict[str, dict]]]:
    """The rows of each problem, by peer and direction."""
    found: dict = {}
    for row in rows:
        peers = found.setdefault(tuple(row[name] for name in PROBLEM), {})
        peers.setdefault(row["peer"], {})[row["direction"]] = row
    return found
