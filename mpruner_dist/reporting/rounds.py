"""What the rounds of a run came to, from `rounds.json`, as rows of text and as a figure."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mpruner_dist.plan import format_layers
from mpruner_dist.reporting.figures import BLUE, GREY, RED, svg, wide_figure
from mpruner_dist.reporting.table import duration_text, metric_name, parameters_text, value_text

HEADINGS = ("round", "from", "stride", "removed", "layers", "parameters", "metric", "change", "time", "decision")
Record = dict[str, Any]


def gate_name(record: Record) -> str:
    """What the gate measures: perplexity, accuracy, or a task with its metric."""
    return str(record["task"] if record["metric"] == "task" else metric_name(record["metric"]))


def round_rows(record: Record) -> list[tuple[str, ...]]:
    """One row a round, under HEADINGS; layers by their numbers in the original."""
    return [
        (
            str(entry["round"]),
            f"round {entry['base']}" if entry["base"] else "original",
            str(entry["stride"]),
            format_layers(entry["removed"]).replace(",", ", "),
            str(len(entry["kept"])),
            *_measured(entry, record["metric"]),
        )
        for entry in record["rounds"]
    ]


def _measured(entry: Record, metric: str) -> tuple[str, ...]:
    if "metric" not in entry:
        return ("", "", "", "", f"rolled back: {entry['why']}")
    return (
        parameters_text(entry["parameters"]),
        value_text(metric, entry["metric"]),
        entry["change"],
        duration_text(entry["seconds"]),
        "accepted" if entry["accepted"] else "rolled back",
    )


def print_rounds(path: Path) -> None:
    """Print `rounds.json`."""
    record = json.loads(path.read_text())
    table = Table()
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")  # on a narrow terminal nothing is cut off
    for row in round_rows(record):
        table.add_row(*row)
    console = Console(markup=False, emoji=False)
    console.print(table)
    console.print(f"rounds ended: {record['stopped']}")


def rounds_summary(record: Record) -> list[str]:
    """Why the rounds ended, and against what they were judged, in sentences."""
    accepted = sum(entry["accepted"] for entry in record["rounds"])
    name = gate_name(record)
    before = value_text(record["metric"], record["original"][record["metric"]])
    sentences = [
        f"{len(record['rounds'])} round(s), {accepted} accepted. Each began from the last accepted model and was "
        f"judged on data that it was not trained on: {name}, {before} of the original, {record['limit']}. A round that "
        "broke this, or that came to nothing, was rolled back, and the next removed less (a larger stride).",
        f"The rounds ended: {record['stopped']}.",
    ]
    if not accepted:
        sentences.insert(0, "No round was accepted: the original is kept as it is.")
    return sentences


def rounds_figure(record: Record) -> str:
    """The gate's metric by the layers that are left, accepted and rolled back rounds, and what is tolerated."""
    figure, axes = wide_figure(2.9)
    measured = [entry for entry in record["rounds"] if "metric" in entry]
    original = record["original"]
    path = [(original["layers"], original[record["metric"]])]
    path += [(entry["layers"], entry["metric"]) for entry in measured if entry["accepted"]]
    axes.plot(*zip(*path, strict=True), "o-", color=BLUE, markersize=5, linewidth=1.2, label="accepted")
    refused = [(entry["layers"], entry["metric"]) for entry in measured if not entry["accepted"]]
    if refused:
        axes.plot(*zip(*refused, strict=True), "x", color=RED, markersize=7, label="rolled back")
    axes.axhline(record["worst"], color=GREY, linestyle="--", linewidth=1, label="tolerated")
    axes.invert_xaxis()
    axes.set_xlabel("layers left", fontsize=9)
    axes.set_ylabel(gate_name(record), fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    return svg(figure)
