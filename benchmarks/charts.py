"""The charts of a CPU result: times of the cases, times against the length, shares by type."""

from __future__ import annotations

from pathlib import Path

from plotting import pyplot
from record import DIRECTIONS, DTYPES, OURS, PROBLEM, TITLES, USUAL_LENGTH, by_problem

LIMIT = "limit"
LABELS = {
    OURS: "sparse_attn",
    "sdpa_dense": "SDPA, dense",
    "sdpa_mask": "SDPA with the mask",
    "flex_attention": "FlexAttention",
    "longformer": "HF Longformer",
    "bigbird": "HF BigBird",
    "local_attention": "local-attention",
    "chunked_bmm": "chunked bmm",
    "chunk_loop": "chunk loop",
    "chunk_loop_tuned": "chunk loop, backward by hand",
}
_PALETTE = "#c1272d #b0b0b0 #707070 #1f77b4 #2ca02c #98c379 #9467bd #e0a030 #17a2b8 #0b5563"
COLORS = dict(zip(LABELS, _PALETTE.split(), strict=True))


def _most_common(rows: list[dict], **fields: object) -> list[dict]:
    """The rows with these fields and, for the others of a problem, the values of most rows."""
    rows = [row for row in rows if all(row[key] == value for key, value in fields.items())]
    for name in PROBLEM:
        if name in ("case", "length") or not rows:
            continue
        values = [row[name] for row in rows]
        usual = max(dict.fromkeys(values), key=values.count)
        rows = [row for row in rows if row[name] == usual]
    return rows


def _legend(figure, handles, labels) -> None:
    columns = max(2, int(figure.get_figwidth() / 2.2))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


def _finish(plt, figure, report: dict, title: str, path: Path) -> Path:
    env = report["environment"]
    figure.suptitle(f"{title}\n{env['cpu']}, torch {env['versions']['torch']}", fontsize=10)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path


def _sizes(row: dict) -> str:
    return f"{row['heads']} heads of {row['head_dim']}, {row['dtype']}, {row['threads']} threads"


def bars(report: dict, path: Path) -> Path | None:
    """The time of every peer for each case of the usual length, with the limit as a line."""
    rows = _most_common(report["results"])
    lengths = [row["length"] for row in rows]
    length = USUAL_LENGTH if USUAL_LENGTH in lengths else max(lengths, key=lengths.count)
    rows = [row for row in rows if row["length"] == length]
    problems = by_problem(rows)
    plt = pyplot()
    size = (max(8.0, 2.2 + 1.5 * len(problems)), 8.5)
    figure, panels = plt.subplots(2, 1, figsize=size, sharex=True, layout="constrained")
    shown = [p for p in LABELS if any("median_ms" in r for r in rows if r["peer"] == p)]
    width = 0.86 / len(shown)
    for panel, direction in zip(panels, DIRECTIONS, strict=True):
        for c, peers in enumerate(problems.values()):
            for p, peer in enumerate(shown):
                found = peers.get(peer, {}).get(direction, {})
                if "median_ms" not in found:
                    continue
                x, median = c + (p - (len(shown) - 1) / 2) * width, found["median_ms"]
                spread = [[median - found["min_ms"]], [found["max_ms"] - median]]
                panel.bar(x, median, width, color=COLORS[peer])
                panel.errorbar(x, median, spread, color="#444444", linewidth=0.7, capsize=1.2)
                text = f"{median:.0f}" if median >= 10 else f"{median:.1f}"
                at = {"ha": "center", "va": "bottom", "fontsize": 6, "rotation": 90}
                panel.text(x, found["max_ms"] * 1.08, text, **at)
            limit = next(iter(peers.values()))[direction]["limit_ms"]
            panel.hlines(limit, c - 0.45, c + 0.45, color="black", linestyle="--", linewidth=1.2)
        panel.set_yscale("log")
        panel.margins(x=0.01, y=0.12)
        panel.set_ylabel("milliseconds")
        panel.set_title(TITLES[direction])
        panel.grid(axis="y", which="major", alpha=0.3)
        panel.set_axisbelow(True)
    panels[1].set_xticks(range(len(problems)), [key[0] for key in problems])
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[peer]) for peer in shown]
    handles.append(plt.Line2D([], [], color="black", linestyle="--"))
    labels = [*(LABELS[peer] for peer in shown), "limit: products, then exp"]
    _legend(figure, handles, labels)
    title = f"{length} tokens, {_sizes(rows[0])}: medians and ranges"
    return _finish(plt, figure, report, title, path)


def _lines(panel, points: dict[str, dict[int, float]]) -> None:
    """Log-log lines by peer, ours on top, the limit dashed."""
    for peer in (*(p for p in LABELS if p != OURS), OURS, LIMIT):
        line = points.get(peer, {})
        if len(line) < 2:
            continue
        x = sorted(line)
        style = {"color": "black", "linestyle": "--"} if peer == LIMIT else {"marker": "o"}
        style |= {} if peer == LIMIT else {"color": COLORS[peer], "label": LABELS[peer]}
        style |= {"linewidth": 2.4} if peer == OURS else {"linewidth": 1.2}
        panel.plot(x, [line[n] for n in x], markersize=4, **style)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    places = sorted(points[LIMIT])
    panel.set_xticks(places, map(str, places), fontsize=8)
    panel.grid(which="major", alpha=0.3)
    panel.set_ylabel("milliseconds")


def lines(report: dict, path: Path) -> Path | None:
    """Time against the length, and against the reach of the window, for all peers."""
    rows = _most_common([row for row in report["results"] if "median_ms" in row])
    over_n, over_w = _series(rows)
    if not over_n and not over_w:
        return None
    plt = pyplot()
    columns = [x for x in (("N", over_n), ("w", over_w)) if x[1]]
    figure, panels = plt.subplots(
        2, len(columns), figsize=(6.8 * len(columns), 9.5), squeeze=False, layout="constrained"
    )
    for column, (variable, (title, by_direction)) in enumerate(columns):
        for panel, direction in zip(panels[:, column], DIRECTIONS, strict=True):
            _lines(panel, by_direction[direction])
            panel.set_title(f"{title}, {TITLES[direction]}", fontsize=10)
            panel.set_xlabel({"N": "tokens", "w": "keys on each side"}[variable])
    handles = {}
    for panel in panels.flat:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    _legend(figure, handles.values(), handles)
    title = f"{_sizes(rows[0])}; dashed: the limit"
    return _finish(plt, figure, report, title, path)


def _series(rows: list[dict]) -> tuple:
    """Time by peer over the length of the case with most lengths, and over reaches."""
    lengths: dict = {}
    reaches: dict = {}
    for row in rows:
        if row["peer"] == OURS:
            lengths.setdefault(row["case"], set()).add(row["length"])
            reach = row["case"].removeprefix("window")
            if reach.isdigit():
                reaches.setdefault(row["length"], set()).add(int(reach))
    case = max(lengths, key=lambda name: len(lengths[name]), default=None)
    length = max(reaches, key=lambda n: len(reaches[n]), default=None)
    return (
        _line_points(rows, f"{case}", {"case": case}, lambda row: row["length"])
        if len(lengths.get(case, ())) > 2
        else None,
        _line_points(
            [row for row in rows if row["case"].removeprefix("window").isdigit()],
            f"windows of {length} tokens",
            {"length": length},
            lambda row: int(row["case"].removeprefix("window")),
        )
        if len(reaches.get(length, ())) > 2
        else None,
    )


def _line_points(rows: list[dict], title: str, fields: dict, x) -> tuple[str, dict]:
    found: dict = {direction: {LIMIT: {}} for direction in DIRECTIONS}
    for row in rows:
        if all(row[key] == value for key, value in fields.items()):
            panel = found[row["direction"]]
            panel.setdefault(row["peer"], {})[x(row)] = row["median_ms"]
            panel[LIMIT][x(row)] = row["limit_ms"]
    return title, found


def types(report: dict, path: Path) -> Path | None:
    """Share of the float32 limit by type and head size: ours and the best peer."""
    rows = [row for row in report["results"] if row["length"] == USUAL_LENGTH]
    usual = {key: max((row[key] for row in rows), default=0) for key in ("heads", "threads")}
    rows = [row for row in rows if all(row[key] == value for key, value in usual.items())]
    problems = list(by_problem(rows).items())
    kinds = sorted(
        {(key[4], key[2]) for key, _ in problems}, key=lambda kind: (DTYPES.index(kind[0]), kind[1])
    )
    cases = list(dict.fromkeys(key[0] for key, _ in problems))
    cases = [c for c in cases if sum(key[0] == c for key, _ in problems) == len(kinds)]
    if len(kinds) < 3 or not cases:
        return None
    plt = pyplot()
    figure, panels = plt.subplots(2, 1, figsize=(2.4 + 2 * len(cases), 8), layout="constrained")
    width, colors = 0.86 / len(kinds), plt.get_cmap("tab20").colors
    for panel, direction in zip(panels, DIRECTIONS, strict=True):
        for key, peers in problems:
            if key[0] not in cases:
                continue
            k = kinds.index((key[4], key[2]))
            x = cases.index(key[0]) + (k - (len(kinds) - 1) / 2) * width
            shares = {
                peer: 100 * rows[direction].get("share_of_float32_limit", 0)
                for peer, rows in peers.items()
            }
            panel.bar(x, shares.pop(OURS), width * 0.92, color=colors[k])
            if shares:
                panel.plot(x, max(shares.values()), "_", color="black", markersize=11)
        panel.axhline(100, color="black", linestyle="--", linewidth=1)
        panel.set_xticks(range(len(cases)), cases)
        panel.set_ylabel("% of the float32 limit")
        panel.set_title(TITLES[direction])
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[k]) for k in range(len(kinds))]
    handles.append(plt.Line2D([], [], color="black", marker="_", linestyle="", markersize=11))
    labels = [*(f"{dtype}, heads of {head_dim}" for dtype, head_dim in kinds), "the best peer"]
    _legend(figure, handles, labels)
    title = f"{USUAL_LENGTH} tokens, {usual['heads']} heads, {usual['threads']} threads"
    return _finish(plt, figure, report, title, path)


def draw(report: dict, path: Path) -> list[Path]:
    """Draws what the result has data for, beside `path`."""
    drawn = [
        kind(report, path.with_name(f"{path.stem}_{kind.__name__}.png"))
        for kind in (bars, lines, types)
    ]
    return [found for found in drawn if found]
