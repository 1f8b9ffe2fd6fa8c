"""The figures of a report, as SVG text. L layers; cka_LL and stderr_LL are matrices [L, L].

Colours and axes of CKA are logarithmic in 1 - CKA: the similarities that decide lie between 0.9 and 1, where a linear
scale shows nothing once a single layer is unlike the others.
"""

import io
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from mpruner_dist.plan import Plan

Floats = npt.NDArray[np.float64]
Curve = list[tuple[int, float]]

RED, BLUE, GREY = "#c1272d", "#1f5a96", "#6b6b6b"
SMALLEST_DISTANCE = 1e-4  # of 1 - CKA: noise can bring an unbiased estimate to 1 and beyond
TICKS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def similarity_figure(cka_LL: Floats, plan: Plan) -> str:
    """Heat map of CKA, blank where it is NaN; clusters of more than one layer outlined, dropped layers crossed."""
    depth = len(cka_LL)
    distance_LL = np.maximum(1 - cka_LL, SMALLEST_DISTANCE)
    nearest, farthest = _colour_range(distance_LL)
    figure = Figure(figsize=(6.8, 5.8), layout="constrained")
    axes = figure.add_subplot()
    # interpolation "none" keeps one pixel a cell: the SVG stays small and sharp for any depth
    image = axes.imshow(distance_LL, cmap="viridis_r", norm=LogNorm(nearest, farthest), interpolation="none")
    for cluster in plan.clusters:
        if len(cluster) > 1:
            corner = (cluster[0] - 0.5, cluster[0] - 0.5)
            axes.add_patch(Rectangle(corner, len(cluster), len(cluster), fill=False, edgecolor="black", linewidth=1.3))
    axes.plot(plan.dropped, plan.dropped, "x", color=RED, markersize=min(6, 140 / depth), markeredgewidth=1.2)
    bar = figure.colorbar(image, ax=axes, extend="both", shrink=0.86)
    bar.ax.invert_yaxis()
    _label_as_cka(bar.ax.yaxis)
    bar.set_label(f"CKA, colours from {1 - farthest:.3f} to {1 - nearest:.3f}", fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        _label_layers(axis, depth, plan.dropped)
        axis.set_label_text("layer", fontsize=9)
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    return svg(figure)


def neighbours_figure(cka_LL: Floats, stderr_LL: Floats | None, plan: Plan, threshold: float | None) -> str:
    """CKA of each layer with the next, a band of two standard errors, dropped layers and the threshold, if any."""
    depth = len(cka_LL)
    between = np.arange(depth - 1) + 0.5
    distance = 1 - np.diagonal(cka_LL, 1)
    spread = np.zeros_like(distance) if stderr_LL is None else 2 * np.diagonal(stderr_LL, 1)
    near, middle, far = (np.maximum(d, SMALLEST_DISTANCE) for d in (distance - spread, distance, distance + spread))
    figure, axes = wide_figure(2.9)
    for layer in plan.dropped:
        axes.axvspan(layer - 0.5, layer + 0.5, color=RED, alpha=0.13, linewidth=0)
    axes.fill_between(between, near, far, color=BLUE, alpha=0.3, linewidth=0)
    axes.plot(between, middle, "o-", color=BLUE, markersize=min(3.5, 180 / depth), linewidth=1.1)
    reach = [np.nanmin(near), np.nanmax(far)]  # of the last layer of an encoder and the first of a decoder: NaN
    if threshold is not None:
        level = max(1 - threshold, SMALLEST_DISTANCE)
        axes.axhline(level, color=GREY, linestyle="--", linewidth=1)
        axes.text(
            1.01, level, f"threshold\n{threshold:g}", transform=axes.get_yaxis_transform(), va="center", fontsize=8
        )
        reach.append(level)
    axes.set_yscale("log")
    axes.set_ylim(max(reach) * 1.25, min(reach) / 1.25)
    _label_as_cka(axes.yaxis)
    axes.set_xlim(-0.7, depth - 0.3)
    _label_layers(axes.xaxis, depth, plan.dropped)
    axes.set_xlabel("layer (each point lies between the two layers that it compares)", fontsize=9)
    axes.set_ylabel("CKA with the next layer", fontsize=9)
    return svg(figure)


def influence_figure(influence_L: Floats, stderr_L: Floats | None, plan: Plan) -> str:
    """Block influence of each layer with two standard errors either way; dropped layers in another colour."""
    figure, axes = wide_figure(2.5)
    colours = [RED if layer in plan.dropped else BLUE for layer in range(len(influence_L))]
    spread = None if stderr_L is None else 2 * stderr_L
    axes.bar(range(len(influence_L)), influence_L, yerr=spread, color=colours, alpha=0.75, error_kw={"linewidth": 0.8})
    axes.set_yscale("log")
    axes.set_xlim(-0.7, len(influence_L) - 0.3)
    _label_layers(axes.xaxis, len(influence_L), plan.dropped)
    axes.set_xlabel("layer", fontsize=9)
    axes.set_ylabel("block influence", fontsize=9)
    return svg(figure)


def losses_figure(training: Curve, validation: Curve, unit: str) -> str:
    """Training and validation loss by step, in nats for each token, text or image."""
    figure, axes = wide_figure(2.9)
    if training:
        axes.plot(*zip(*training, strict=True), color=BLUE, alpha=0.75, linewidth=1, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color=RED, markersize=4, linewidth=1.4, label="validation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(f"loss, nats per {unit}", fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    return svg(figure)


def curves_figure(curves: dict[str, Curve], bold: tuple[str, ...], below: str, beside: str) -> str:
    """Some curves by name on a logarithmic axis; those in `bold` stand out and the others are grey."""
    figure, axes = wide_figure(3.8)
    for name, curve in curves.items():
        if not curve:
            continue
        style = {"linewidth": 1.5, "zorder": 3} if name in bold else {"linewidth": 0.8, "color": GREY, "alpha": 0.5}
        axes.plot(*zip(*curve, strict=True), "o-", markersize=3, label=name if name in bold else None, **style)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(below, fontsize=9)
    axes.set_ylabel(beside, fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def _colour_range(distance_LL: Floats) -> tuple[float, float]:
    """Smallest and largest 1 - CKA that get a colour of their own: few outliers do not take it from all others."""
    pairs = distance_LL[~np.eye(len(distance_LL), dtype=bool)]
    known = pairs[np.isfinite(pairs)]
    nearest, farthest = np.percentile(known, [1, 95]) if len(known) else (SMALLEST_DISTANCE, 1.0)
    return float(nearest), float(max(farthest, 2 * nearest))


def _label_layers(axis: Any, depth: int, dropped: list[int]) -> None:
    """As many layer numbers as fit; those of dropped layers in red, and a red tick where the number did not fit."""
    room = 64 // len(str(depth - 1))
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100) if depth <= step * room), 200)
    shown = range(0, depth, step)
    axis.set_major_locator(FixedLocator(list(shown)))
    axis.set_minor_locator(FixedLocator([layer for layer in dropped if layer not in shown]))
    axis.set_tick_params(which="major", labelsize=7.5)
    axis.set_tick_params(which="minor", color=RED, length=4, width=1.2)
    for layer, tick in zip(shown, axis.get_major_ticks(), strict=True):
        if layer in dropped:
            tick.tick1line.set_color(RED)
            for label in (tick.label1, tick.label2):
                label.set_color(RED)
                label.set_fontweight("bold")


def _label_as_cka(axis: Any) -> None:
    axis.set_major_locator(FixedLocator(TICKS))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda distance, _: f"{1 - distance:g}"))
    axis.set_tick_params(labelsize=8)


def wide_figure(height: float) -> tuple[Any, Any]:
    """A figure as wide as the page, in inches high, and its axes."""
    figure = Figure(figsize=(8.6, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def svg(figure: Any) -> str:
    """A figure as SVG text; the same figure gives the same text."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mpruner-dist"}):  # same artefacts, same file
        figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return text.getvalue()
