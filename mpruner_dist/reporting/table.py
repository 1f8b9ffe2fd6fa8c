"""The result of a run as rows of text, and as a table on the terminal. Every number of a report is formatted here."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HEADINGS = ("", "layers", "parameters", "bytes", "perplexity", "tokens/s")
_FIELDS = ("layers", "parameters", "bytes", "perplexity", "tokens_per_second")


def parameters_text(count: int) -> str:
    """A number of parameters: `134.5 M`, `70.55 B`."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def bytes_text(count: int) -> str:
    """A number of bytes: `538.1 MB`, `141.11 GB`."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def perplexity_text(perplexity: float) -> str:
    """A perplexity: `16.61`; a broken model's `1.23e+07` stays as short."""
    return f"{perplexity:.2f}" if perplexity < 1e5 else f"{perplexity:.3g}"


def change_text(value: float, original: float) -> str:
    """A change relative to the original: `-10.5 %`; from tenfold on, `12.3-fold`."""
    ratio = value / original
    return f"{(ratio - 1) * 100:+.1f} %" if ratio < 10 else f"{ratio:.3g}-fold"


def duration_text(seconds: float) -> str:
    """A duration: `0.2 s`, `7 min 05 s`, `3 h 20 min`."""
    if seconds < 59.95:  # else it would be written as 60.0 s
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a model, as text, under HEADINGS."""
    return [
        (
            label,
            str(entry["layers"]),
            parameters_text(entry["parameters"]),
            bytes_text(entry["bytes"]),
            perplexity_text(entry["perplexity"]),
            f"{entry['tokens_per_second']:.0f}",
        )
        for label, entry in evaluation.items()
    ]


def evaluation_changes(evaluation: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a model under HEADINGS: how far each number is from the original's; empty text in the original's row."""
    original = evaluation["original"]
    return [
        ("", *("" if label == "original" else change_text(entry[field], original[field]) for field in _FIELDS))
        for label, entry in evaluation.items()
    ]


def print_evaluation(path: Path) -> None:
    """Print `evaluation.json`."""
    table = Table(*HEADINGS)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in evaluation_rows(json.loads(path.read_text())):
        table.add_row(*row)
    Console().print(table)
