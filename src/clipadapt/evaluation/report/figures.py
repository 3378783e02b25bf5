"""The images of a report, drawn by matplotlib: each function takes a table of figures and gives a Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from clipadapt.evaluation.statistics import Ranking, bootstrap_interval

# Okabe and Ito's colours, which are distinguishable with any colour vision; markers and lines differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#7F7F7F", "#B2182B")
MARKERS = "osD^vPX*<>"
SIZE = (5.0, 3.6)  # inches: shrunk to a telephone's width, labels of 9 points can still be read
matplotlib.rcParams.update(
    {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none", "svg.hashsalt": "0"}
)


def curves(by_method: Mapping[str, Mapping[float, Sequence[float]]], *, x: str, y: str, title: str) -> Figure:
    """A line for each method: the mean over seeds at each x, in a band of its 95 % bootstrap interval."""
    figure = Figure(figsize=(SIZE[0], SIZE[1] + 0.2 * ((len(by_method) + 2) // 3)), layout="constrained")
    axes = figure.subplots()
    ticks = sorted({value for points in by_method.values() for value in points})
    for i, (method, points) in enumerate(by_method.items()):
        at = sorted(points)
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.plot(at, [100 * np.mean(points[v]) for v in at], label=method, linewidth=1.4, markersize=4, **style)
        bands = np.array([bootstrap_interval(points[v], draws=2000) for v in at])
        axes.fill_between(at, 100 * bands[:, 0], 100 * bands[:, 1], color=style["color"], alpha=0.15, linewidth=0)
    if len(ticks) > 1 and min(ticks) > 0:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def ranks(ranking: Ranking, *, title: str) -> Figure:
    """Critical-difference plot: mean ranks on a line, methods that cannot be told apart joined by a bar."""
    names = list(ranking.ranks)
    half = (len(names) + 1) // 2
    low, high = 1, max(2, int(np.ceil(max(ranking.ranks.values()))))
    bars = len(ranking.cliques)
    height = 1.0 + 0.22 * half + 0.14 * bars
    figure = Figure(figsize=(5.6, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(low - 0.02, high + 0.02), ylim=(-(half + 0.7 * bars + 1), 0.8), title=title)
    axes.hlines(0, low, high, color="black", linewidth=1)
    for tick in range(low, high + 1, 1 + (high - low) // 12):
        axes.vlines(tick, 0, 0.2, color="black", linewidth=1)
        axes.text(tick, 0.3, str(tick), ha="center", va="bottom", fontsize=8)
    for i, bar in enumerate(ranking.cliques):
        ends = [ranking.ranks[bar[0]] - 0.02, ranking.ranks[bar[-1]] + 0.02]
        axes.plot(ends, [-0.5 - 0.6 * i] * 2, color="#0072B2", linewidth=3, solid_capstyle="round")
    for i, name in enumerate(names):
        left = i < half
        y = -(0.7 * bars + 1 + (i if left else len(names) - 1 - i))
        edge = low if left else high
        axes.plot([ranking.ranks[name]] * 2 + [edge], [0, y, y], color="#777777", linewidth=0.7)
        text = f"{name} {ranking.ranks[name]:.2f} " if left else f" {ranking.ranks[name]:.2f} {name}"
        axes.text(edge, y, text, ha="right" if left else "left", va="center", fontsize=8)
    axes.axis("off")
    return figure


def pareto(points: Mapping[str, tuple[float, float]], *, x: str, y: str, title: str) -> Figure:
    """Methods by cost (x) and accuracy (y); those that none beats in both are joined, and named where there is room."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    best = front(points)
    for name, (cost, value) in points.items():
        axes.plot(cost, 100 * value, "o", color="#0072B2" if name in best else "#8A8A8A", markersize=5)
    axes.step(
        [points[n][0] for n in best], [100 * points[n][1] for n in best], where="post", color="#0072B2", alpha=0.5
    )
    costs = [cost for cost, _ in points.values() if cost > 0]
    if costs and max(costs) >= 10 * min(costs):
        if len(costs) == len(points):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(costs) < 100 * min(costs) else (1,)))
        else:
            axes.set_xscale("symlog", linthresh=10 ** np.floor(np.log10(min(costs))), linscale=0.5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.ticklabel_format(axis="x", style="plain", useOffset=False)
        axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.08, y=0.12)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.25)
    figure.draw_without_rendering()  # settles where things are
    taken: list[Any] = []
    for name in reversed(best):
        # No method is above and left of an unbeaten one; only at the left edge must its name go elsewhere.
        spot, box = (points[name][0], 100 * points[name][1]), {"facecolor": "white", "alpha": 0.7, "pad": 0.5, "lw": 0}
        label = axes.annotate(name, spot, (-5, 4), textcoords="offset points", fontsize=8, ha="right", bbox=box)
        label.set_in_layout(False)
        if label.get_window_extent().x0 < axes.bbox.x0:
            label.set(ha="left", x=5)
        room = label.get_window_extent().padded(1)
        if any(room.overlaps(other) for other in taken):
            label.remove()
        else:
            taken.append(room)
    return figure


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The methods that no other beats in accuracy at the same or a smaller cost, the cheapest first."""
    found: list[str] = []
    for name in sorted(points, key=lambda n: (points[n][0], -points[n][1], n)):
        if not found or points[name][1] > points[found[-1]][1]:
            found.append(name)
    return found


def heat_map(by_method: Mapping[str, Mapping[str, float]], *, title: str) -> Figure:
    """Accuracy of every class (columns, the hardest first) by every method (rows)."""
    methods = list(by_method)
    classes = sorted({c for row in by_method.values() for c in row})
    table = np.array([[by_method[m].get(c, np.nan) for c in classes] for m in methods])
    order = np.argsort(np.nanmean(table, axis=0), kind="stable")
    size = (min(14, 2.5 + 0.16 * len(classes)), min(12, 1.6 + 0.22 * len(methods)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(100 * table[:, order], aspect="auto", vmin=0, vmax=100, cmap="viridis")
    axes.set_yticks(range(len(methods)), methods, fontsize=8)
    shown = range(len(classes)) if len(classes) <= 60 else []
    axes.set_xticks(shown, [classes[order[i]] for i in shown], rotation=90, fontsize=7)
    axes.set_title(title)
    figure.colorbar(drawn, ax=axes, label="accuracy in %")
    return figure


def reliability(bins: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str) -> Figure:
    """Accuracy against confidence for each method; on the diagonal a model is as sure as it is right."""
    figure = Figure(figsize=(SIZE[0], SIZE[1] + 0.2 * ((len(bins) + 2) // 3)), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color="#777777", linewidth=1, linestyle="--")
    for i, (method, found) in enumerate(bins.items()):
        axes.plot(
            [100 * b["confidence"] for b in found],
            [100 * b["accuracy"] for b in found],
            label=method,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            linewidth=1.2,
            clip_on=False,  # a point at 100 % is shown whole
        )
    axes.set(xlabel="confidence in %", ylabel="accuracy in %", title=title, xlim=(0, 100), ylim=(0, 100))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure
