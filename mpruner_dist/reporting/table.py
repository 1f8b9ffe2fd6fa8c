"""The result of a run as rows of text, and as a table on the terminal. Its numbers are formatted here."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mpruner_dist.config.task import GENERATED, HEARD, IN_PERCENT

WRITTEN = {
    "macro_f1": "macro F1",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
    "word_error_rate": "word error rate",
}
_RATE = "s_per_second"


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


def metric_text(metric: str, value: float, digits: int = 1) -> str:
    """A value of one of the tasks' metrics: a perplexity and the like of BLEU as a number, a share in percent."""
    if metric == "perplexity":
        return perplexity_text(value)
    return f"{100 * value:.{digits}f} %" if metric in IN_PERCENT else f"{value:.3f}"


def value_text(metric: str, value: float) -> str:
    """A value that a gate compared; of the harness's tasks nobody says whether it is a share."""
    return f"{value:.4g}" if metric == "task" else metric_text(metric, value, 2)


def metric_change_text(metric: str, value: float, original: float) -> str:
    """Its change: of a perplexity relative to the original's, of a share the difference in points."""
    if metric == "perplexity":
        return change_text(value, original)
    return f"{100 * (value - original):+.1f} points" if metric in IN_PERCENT else f"{value - original:+.3f}"


def metric_name(metric: str) -> str:
    """A metric as it is written in text."""
    return WRITTEN.get(metric, metric)


def unit_of(evaluation: dict[str, Any]) -> str:
    """What the models' speed is counted in: token, text."""
    names: list[str] = list(next(iter(evaluation.values())))
    return next(name for name in names if name.endswith(_RATE)).removesuffix(_RATE)


def metrics_of(evaluation: dict[str, Any]) -> tuple[str, ...]:
    """The metrics of quality that are shown of `evaluation.json`."""
    entry = next(iter(evaluation.values()))
    for known in (HEARD if "word_error_rate" in entry else GENERATED, ("perplexity",), ("accuracy", "macro_f1")):
        if shown := tuple(metric for metric in known if metric in entry):
            return shown
    raise ValueError(f"no known metric among {', '.join(entry)}")


def headings(evaluation: dict[str, Any]) -> tuple[str, ...]:
    """What stands above the columns."""
    names = [metric_name(metric) for metric in metrics_of(evaluation)]
    return ("", "layers", "parameters", "bytes", *names, f"{unit_of(evaluation)}s/s")


def duration_text(seconds: float) -> str:
    """A duration: `0.2 s`, `7 min 05 s`, `3 h 20 min`."""
    if seconds < 59.95:  # else it would be written as 60.0 s
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a model, as text, under its headings."""
    rate = f"{unit_of(evaluation)}{_RATE}"
    return [
        (
            label,
            str(entry["layers"]),
            parameters_text(entry["parameters"]),
            bytes_text(entry["bytes"]),
            *(metric_text(metric, entry[metric]) for metric in metrics_of(evaluation)),
            f"{entry[rate]:.0f}",
        )
        for label, entry in evaluation.items()
    ]


def evaluation_changes(evaluation: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a model under the headings: how far each number is from the original's; empty in the original's row.

    Speeds that were measured on other workers do not compare.
    """
    original, metrics = evaluation["original"], metrics_of(evaluation)
    rate = f"{unit_of(evaluation)}{_RATE}"
    fields = ("layers", "parameters", "bytes", *metrics, rate)

    def change(field: str, entry: dict[str, Any]) -> str:
        if field == rate and workers_text(entry) != workers_text(original):
            return ""
        if field in metrics:
            return metric_change_text(field, entry[field], original[field])
        return change_text(entry[field], original[field])

    return [
        ("", *("" if label == "original" else change(field, entry) for field in fields))
        for label, entry in evaluation.items()
    ]


def workers_text(entry: dict[str, Any]) -> str:
    """What a model was measured on: `2 workers (cpu)`."""
    return f"{entry['workers']} worker{'' if entry['workers'] == 1 else 's'} ({entry['device']})"


def measured_on(evaluation: dict[str, Any]) -> str:
    """What the models were measured on, each by itself where a run went on with other workers."""
    texts = {label: workers_text(entry) for label, entry in evaluation.items()}
    if len(set(texts.values())) == 1:
        return texts["original"]
    return ", ".join(f"{text} for {label}" for label, text in texts.items()) + ", which does not compare"


def task_table(evaluation: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Headings and rows of what each model makes of tasks of the lm-evaluation-harness, if any were asked for."""
    tasks = evaluation["original"].get("tasks", {})
    rows = [
        (f"{name} ({found['task_metric']})", *(f"{entry['tasks'][name]['task']:.4g}" for entry in evaluation.values()))
        for name, found in tasks.items()
    ]
    return (("task", *evaluation), rows) if rows else None


def print_evaluation(path: Path) -> None:
    """Print `evaluation.json`."""
    evaluation = json.loads(path.read_text())
    _print(headings(evaluation), evaluation_rows(evaluation))
    if of_tasks := task_table(evaluation):
        _print(*of_tasks)


def _print(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(*headings, pad_edge=False, show_edge=False)  # so that 80 columns hold three metrics
    for column in table.columns:
        column.overflow = "fold"  # on a narrow terminal nothing is cut off
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    Console(markup=False, emoji=False).print(table)
