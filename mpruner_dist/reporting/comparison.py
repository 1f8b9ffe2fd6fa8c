"""What `compare.json` says, as rows of text, on the terminal and as a figure."""

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mpruner_dist.reporting.figures import curves_figure
from mpruner_dist.reporting.table import perplexity_text

Comparison = dict[str, Any]
HIGHLIGHTED = ("search", "greedy", "partition", "influence", "angular", "anchor, keeps first")


def comparison_table(content: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows: quality of each planner at each depth, the best with a star, and forward passes."""
    depths = [str(depth) for depth in content["depths"]]
    lowest = {}
    for depth in depths:
        losses = [by_depth[depth]["loss"] for by_depth in content["planners"].values()]
        lowest[depth] = min((loss for loss in losses if loss is not None), default=None)
    rows = []
    for name, by_depth in content["planners"].items():
        cells = [_quality(by_depth[depth], lowest[depth], content) for depth in depths]
        passes = by_depth[depths[-1]].get("passes", 0)
        rows.append((name, *cells, f"{passes:.1f}" if passes else "0"))
    return ("planner", *depths, "passes"), rows


def comparison_note(content: Comparison) -> str:
    """What the numbers are."""
    name, whole = _name(content).capitalize(), _text(content["loss_of_the_whole_model"], content)
    data = "tokens of validation text" if _of_words(content) else f"validation {content['unit']}s"
    return (
        f"{name} without so many of {content['layers']} layers, nothing retrained, on "
        f"{content['held_out_tokens']:,} {data} that no planner saw ({whole} with all layers). "
        f"Greedy and search judged on {content['judged_on_tokens']:,} others; passes are forward passes of the "
        "whole model over those, for the deepest plan."
    )


def print_comparison(path: Path) -> None:
    """Print `compare.json`."""
    content = json.loads(path.read_text())
    headings, rows = comparison_table(content)
    table = Table(*headings)
    for column in table.columns:
        column.overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, emoji=False)
    console.print(table)
    console.print(comparison_note(content))


def plans_figure(content: Comparison) -> str:
    """Quality by layers removed, a line for each planner, as SVG."""
    curves = {
        name: [
            (depth, _value(by_depth[str(depth)]["loss"], content))
            for depth in content["depths"]
            if by_depth[str(depth)]["loss"] is not None
        ]
        for name, by_depth in content["planners"].items()
    }
    return curves_figure(curves, HIGHLIGHTED, "layers removed", f"{_name(content)}, held-out data")


def _of_words(content: Comparison) -> bool:
    """Whether the losses are of the next token; comparisons of old say nothing else."""
    return bool(content.get("unit", "token") == "token")


def _name(content: Comparison) -> str:
    return "perplexity" if _of_words(content) else "loss"


def _value(loss: float, content: Comparison) -> float:
    return math.exp(min(loss, 700.0)) if _of_words(content) else loss


def _text(loss: float, content: Comparison) -> str:
    return perplexity_text(_value(loss, content)) if _of_words(content) else f"{loss:.4f}"


def _quality(entry: dict[str, Any], lowest: float | None, content: Comparison) -> str:
    if entry["dropped"] is None:
        return "refused"
    if entry["loss"] is None:
        return "not finite"
    return _text(entry["loss"], content) + (" *" if entry["loss"] == lowest else "")
