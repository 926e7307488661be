"""The table and the chart of `overhead.py`."""

from __future__ import annotations

from pathlib import Path

from plotting import pyplot

ARITHMETIC, OVERHEAD = "#b9b9b9", "#c1272d"
ARITHMETIC_STAGE = "arithmetic"  # in the names of the stages that are no overhead


def table(result: dict) -> str:
    """The result as text."""
    env, options = result["environment"], result["options"]
    lines = [
        f"{env['cpu']}, torch {env['versions']['torch']}, commit {env['commit']}, {env['date']}",
        f"{options['length']} tokens, heads of {options['head_dim']}, window "
        f"±{options['window']}: microseconds of a call (least; beyond the arithmetic)",
    ]
    keys = dict.fromkeys((r["threads"], r["direction"], r["entry"]) for r in result["rows"])
    before = None
    for threads, direction, entry in sorted(keys, key=lambda key: key[:2]):
        if (threads, direction) != before:
            heads = "".join(f"{f'heads {h}':>26}" for h in options["heads"])
            lines += ["", f"{f'{direction}, threads {threads}':<30}{heads}"]
        before = threads, direction
        cells = ""
        for row in result["rows"]:
            if (row["threads"], row["direction"], row["entry"]) == (threads, direction, entry):
                beyond = f"; {row['overhead_us']:5.1f}" if "overhead_us" in row else ""
                brackets = f"({row['min_us']:.1f}{beyond})"
                cells += f"{row['median_us']:9.1f} {brackets:>16}"
        lines.append(f"  {entry:<28}{cells}")
    lines += ["", "stages of a call with one head, one thread"]
    lines += [f"  {row['us']:7.2f}  {row['stage']}" for row in result["stages"]]
    ours = [row["us"] for row in result["stages"] if ARITHMETIC_STAGE not in row["stage"]]
    lines.append(f"  {sum(ours):7.2f}  all but arithmetic")
    targets = [row for row in result["rows"] if "reached" in row]
    lines += ["", "target: overhead of sparse_attn.attention"] if targets else []
    for row in targets:
        engine = f", {row['engine_us']:.1f} of them autograd's engine" if row["engine_us"] else ""
        lines.append(
            f"  {'reached' if row['reached'] else 'missed':<9}{row['direction']:<20}"
            f"heads {row['heads']}, threads {row['threads']}: {row['overhead_us']:.1f} us{engine}; "
            f"wanted below {row['target_us']:.0f} of our own"
        )
    return "\n".join(lines) + "\n"


def draw(result: dict, path: Path) -> None:
    """Times of a call with one head, split, and the stages."""
    plt = pyplot()
    rows = [
        row
        for row in result["rows"]
        if row["group"] == "attention" and row["threads"] == 1 and "overhead_us" in row
    ]
    few = min(row["heads"] for row in rows)
    rows = sorted((row for row in rows if row["heads"] == few), key=lambda row: row["direction"])
    figure, panels = plt.subplots(
        2, 1, figsize=(9, 4 + 0.2 * len(rows)), layout="constrained",
        height_ratios=(len(rows), len(result["stages"])),
    )  # fmt: skip
    names = [f"{r['entry']}: {r['direction']}" for r in rows]
    beyond = [max(0.0, r["overhead_us"]) for r in rows]
    panels[0].barh(names, beyond, color=OVERHEAD, label="beyond the arithmetic")
    panels[0].barh(
        names, [r["arithmetic_us"] for r in rows], left=beyond, color=ARITHMETIC, label="arithmetic"
    )
    panels[0].axvline(30, color="black", linestyle="--", linewidth=1, label="target, engine apart")
    panels[0].legend(frameon=False, loc="lower right", fontsize=8)
    panels[0].set_title(f"heads {few}, tokens {result['options']['length']}", fontsize=10)
    stages = result["stages"]
    panels[1].barh(
        [r["stage"] for r in stages],
        [max(0.0, r["us"]) for r in stages],
        color=[ARITHMETIC if ARITHMETIC_STAGE in r["stage"] else OVERHEAD for r in stages],
    )
    panels[1].set_title("stages", fontsize=10)
    for panel in panels:
        panel.invert_yaxis()
        panel.tick_params(labelsize=7)
        panel.set_xlabel("microseconds")
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    figure.suptitle(f"{result['environment']['cpu']}, one thread", fontsize=10)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def write(result: dict, path: Path) -> str:
    """Writes the table and the chart beside `path`, and gives the table."""
    text = table(result)
    path.with_suffix(".txt").write_text(text)
    draw(result, path.with_suffix(".png"))
    return text
