"""The pictures of docs/PERFORMANCE.md, as SVG and PNG."""
import os, re

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plot

from results import RATIO_GOALS

COLORS = {"cowfs": "#1f6fb4", "cowfs writeback": "#58a6e0", "floor": "#999999", "floor writeback": "#cccccc", "fuse-overlayfs": "#d08a1c",
          "overlayfs": "#4a9c5d", "bindfs": "#b04a5a", "mergerfs": "#7d5ba6"}
# The same file from the same figures, so that a new run shows as a change only where it is one.
matplotlib.rcParams.update({"svg.hashsalt": "cowfs", "font.size": 8, "svg.fonttype": "none"})


def save(figure, directory, name):
    figure.tight_layout()
    figure.savefig(os.path.join(directory, name + ".svg"), metadata={"Date": None})
    figure.savefig(os.path.join(directory, name + ".png"), dpi=110)
    plot.close(figure)


def ratios(results, group, directory):
    rows = [row for g, row in results.speeds if g == group]
    if not rows:
        return
    table = {row: results.ratios(group, row) for row in rows}
    sides = [side for side in COLORS if any(side in ratios for ratios in table.values())]
    figure, axes = plot.subplots(figsize=(8, 0.62 * len(rows) + 1))
    height = 0.8 / max(1, len(sides))
    for number, side in enumerate(sides):
        places = [k + number * height - 0.4 for k in range(len(rows))]
        axes.barh(places, [min(2, table[row].get(side, 0)) for row in rows], height, label=side, color=COLORS[side])
    for k, row in enumerate(rows):
        if row in RATIO_GOALS:
            axes.plot([RATIO_GOALS[row]] * 2, [k - 0.45, k + 0.45], color="black", lw=1.5, label="goal" if row == next(r for r in rows if r in RATIO_GOALS) else None)
    axes.axvline(1, color="black", lw=0.5, ls=":")
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlim(0, 2)
    axes.set_xlabel("speed relative to the bare directory (cut off at 2)")
    axes.legend(loc="lower right", fontsize=7)
    axes.set_title(group)
    save(figure, directory, group)


def cuts(results, directory):
    names = [("longest write, control", "#bbbbbb"), ("longest write, with cuts", "#1f6fb4")]
    bars = {}
    for figure in results.figures:
        found = re.fullmatch(r"(.*): (longest write, (?:control|with cuts))", figure["row"])
        if figure["group"] == "cut" and found:
            bars.setdefault("%s: %s" % (figure["side"], found[1]), {})[found[2]] = figure["value"]
    if not bars:
        return
    figure, axes = plot.subplots(figsize=(8, 0.3 * len(bars) + 1))
    for number, (name, color) in enumerate(names):
        axes.barh([k + 0.4 * number - 0.2 for k in range(len(bars))], [bar.get(name, 0) for bar in bars.values()], 0.4, label=name, color=color)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(left=0.03)
    axes.set_xlabel("ms, median over stretches of time")
    axes.legend(fontsize=7)
    save(figure, directory, "cut")


def growth(results, directory):
    lines = {}
    for figure in results.figures:
        found = re.fullmatch(r"([\d,]+) (pre-images|known files): (.*)", figure["row"])
        if figure["group"] == "growth" and found and figure["value"]:
            lines.setdefault((found[3], figure["unit"]), {})[int(found[1].replace(",", ""))] = figure["value"]
    wanted = [("memory", "MiB"), ("index", "MiB"), ("look-up, found", "µs"), ("keeping one", "µs"), ("opening", "s"), ("rebuilding the index", "s")]
    wanted = [key for key in wanted if len(lines.get(key, {})) > 1]
    if not wanted:
        return
    figure, panes = plot.subplots(1, len(wanted), figsize=(2.1 * len(wanted), 2.2), squeeze=False)
    for axes, (what, unit) in zip(panes[0], wanted):
        points = sorted(lines[what, unit].items())
        axes.loglog([x for x, _ in points], [y for _, y in points], marker="o", color=COLORS["cowfs"])
        axes.set_title("%s, %s" % (what, unit))
        axes.set_xlabel("known files" if what == "memory" else "pre-images")
    save(figure, directory, "growth")


def draw(results, directory):
    for group in ("data", "metadata"):
        ratios(results, group, directory)
    cuts(results, directory)
    growth(results, directory)
