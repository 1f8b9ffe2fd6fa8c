"""The stage `report`: `report.html`, its figures, and a model card in each output folder."""

import base64
import json
import logging
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from mpruner_dist.config import Config
from mpruner_dist.config.task import FACTS
from mpruner_dist.plan import by_stack, format_layers, read_plan
from mpruner_dist.reporting.choice import choice, reasons
from mpruner_dist.reporting.comparison import comparison_note, comparison_table, plans_figure
from mpruner_dist.reporting.figures import influence_figure, losses_figure, neighbours_figure, similarity_figure
from mpruner_dist.reporting.rounds import HEADINGS as ROUND_HEADINGS
from mpruner_dist.reporting.rounds import round_rows, rounds_figure, rounds_summary
from mpruner_dist.reporting.similarity import (
    LAYER_HEADINGS,
    WINDOW_HEADINGS,
    domination,
    layer_rows,
    measurement,
    window_rows,
)
from mpruner_dist.reporting.table import (
    duration_text,
    evaluation_changes,
    evaluation_rows,
    headings,
    measured_on,
    metric_name,
    metric_text,
    metrics_of,
    parameters_text,
    task_table,
    unit_of,
)
from mpruner_dist.reporting.training import training
from mpruner_dist.runs.commit import write_bytes, write_text
from mpruner_dist.runs.digest import file_digest

log = logging.getLogger(__name__)

PACKAGES = ("mpruner-dist", "torch", "deepspeed", "ray", "transformers", "safetensors", "datasets")
CLASSES = " whose class was found, macro F1 the mean over the classes of the harmonic mean of precision and recall"
METRIC_NOTES = {
    "causal-lm": "Perplexity is that of the next token",
    "text-classification": f"Accuracy is the share of the texts{CLASSES}",
    "image-classification": f"Accuracy is the share of the images{CLASSES}",
    "sequence-to-sequence": "BLEU, chrF and ROUGE-L compare what the model generates, word by word the likeliest, with "
    "the right text, and go from 0 to 1",
    "automatic-speech-recognition": "The word error rate counts words that are wrong, too many or missing in what the "
    "model generates, by the words that were said, without regard to capitals and punctuation; BLEU and chrF go from 0 "
    "to 1",
}
CARD_MARKER = "<!-- mpruner-dist -->"
Facts = dict[str, Any]


def write_report(run: Path, config: Config, stages: dict[str, dict[str, Any]]) -> None:
    """Write `report.html`, `figures/` and the model cards from the artefacts of a run.

    Args:
        run: the run folder, with everything up to `evaluation.json` in it.
        config: of the run.
        stages: as the manifest records them.
    """
    facts = _facts(run, config, stages)
    figures = _draw(facts, config)
    for name, svg in figures.items():
        write_text(run / "figures" / f"{name}.svg", svg)
    templates = Environment(
        loader=PackageLoader("mpruner_dist.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    card = templates.get_template("model_card.md")
    for label in ("pruned", "retrained"):
        if label in facts["evaluation"] and (run / label).is_dir():
            _write_card(run / label, lambda **more: card.render(**facts, **more), label)
    # images rather than inline elements: the ids inside two SVG files may clash
    images = {name: base64.b64encode(svg.encode()).decode() for name, svg in figures.items()}
    write_text(run / "report.html", templates.get_template("report.html").render(**facts, images=images))


def _facts(run: Path, config: Config, stages: dict[str, dict[str, Any]]) -> Facts:
    """What both templates may say."""
    similarity, evaluation, data = (
        json.loads((run / name).read_text()) for name in ("cka.json", "evaluation.json", "data/data.json")
    )
    plan = read_plan(run / "plan.json", len(similarity["layers"]))
    retrain = json.loads((run / "retrain.json").read_text()) if "retrained" in evaluation else None
    comparison = _comparison(run)
    repeated = _repeated(data)
    text = "test" if repeated else "held-out"
    rounds = _rounds(run, config)
    accepted = sum(entry["accepted"] for entry in rounds["record"]["rounds"]) if rounds else 1
    return {
        "config": config,
        "model": Path(config.model.path).absolute().name,
        "base_model": _hub_id(config.model.path),
        "similarity": similarity,
        "evaluation": evaluation,
        "data": data,
        "plan": plan,
        "retrain": retrain,
        "rounds": rounds,
        "accepted": accepted,
        "summary": summary(evaluation, text, accepted),
        "text": text,
        "headings": headings(evaluation),
        "facts": FACTS[config.model.task],
        "metric_note": METRIC_NOTES[config.model.task],
        "results": list(zip(evaluation_rows(evaluation), evaluation_changes(evaluation), strict=True)),
        "measured_on": measured_on(evaluation),
        "task_table": task_table(evaluation),
        "kept": format_layers(plan.kept).replace(",", ", "),
        "dropped": format_layers(plan.dropped).replace(",", ", "),
        "by_stack": stacks_text(plan.dropped, similarity.get("stacks") or {}),
        "choice": choice(config.plan, plan, config.rounds, unit_of(evaluation)),
        "reasons": reasons(plan, known_spread=similarity["stderr"] is not None),
        "comparison": comparison,
        "comparison_table": comparison_table(comparison) if comparison else None,
        "comparison_note": comparison_note(comparison) if comparison else "",
        "measurement": measurement(similarity, config.collect, data, FACTS[config.model.task].reads),
        "domination": domination(similarity),
        "layer_table": (LAYER_HEADINGS, layer_rows(similarity)),
        "window_table": (WINDOW_HEADINGS, window_rows(similarity)),
        "training": training(config, data, retrain and retrain.get("weights"), accepted),
        "repeated": repeated,
        "durations": [(name, duration_text(s["seconds"])) for name, s in stages.items() if s["state"] == "done"],
        "versions": _versions(),
        "machine": _machine(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _rounds(run: Path, config: Config) -> Facts | None:
    """The rounds, if the run has any: what came of them, a table, and what a figure needs."""
    if config.rounds is None:
        return None
    record = json.loads((run / "rounds.json").read_text())
    return {"record": record, "summary": rounds_summary(record), "table": (ROUND_HEADINGS, round_rows(record))}


def stacks_text(layers: list[int], stacks: dict[str, int]) -> str:
    """Layers as each stack counts them, where there are several: `encoder.block 2, decoder.block 0-1`."""
    of_each = zip(stacks, by_stack(layers, stacks.values()), strict=True)
    return ", ".join(f"{name} {format_layers(mine)}" for name, mine in of_each if mine)


def summary(evaluation: dict[str, Any], text: str, rounds: int = 1) -> str:
    """The result in one sentence, from the content of `evaluation.json` and what to call the text of the test.

    After several accepted `rounds` the pruned model is what the last of them cut from a model that was retrained.
    """
    original, pruned = evaluation["original"], evaluation.get("pruned")
    metric, unit = metrics_of(evaluation)[0], unit_of(evaluation)
    on = f"on {original[f'{unit}s']:,} {text} {unit}s."
    if pruned is None:
        return (
            f"Nothing was removed: {original['layers']} layers, {parameters_text(original['parameters'])} parameters, "
            f"{metric_name(metric)} {metric_text(metric, original[metric])} {on}"
        )
    share = evaluation_changes(evaluation)[list(evaluation).index("pruned")][headings(evaluation).index("parameters")]
    quality = f"{metric_text(metric, original[metric])} → {metric_text(metric, pruned[metric])} pruned"
    quality += f" (in the last of {rounds} rounds)" if rounds > 1 else ""
    if "retrained" in evaluation:
        quality += f" → {metric_text(metric, evaluation['retrained'][metric])} retrained"
    return (
        f"{original['layers']} → {pruned['layers']} layers, {parameters_text(original['parameters'])} → "
        f"{parameters_text(pruned['parameters'])} parameters ({share}), {metric_name(metric)} {quality} {on}"
    )


def _comparison(run: Path) -> dict[str, Any] | None:
    """What `mpruner plan --compare` found from these similarities, if it was asked."""
    path = run / "compare.json"
    content = json.loads(path.read_text()) if path.exists() else None
    return content if content and content["cka"] == file_digest(run / "cka.json") else None


def _draw(facts: Facts, config: Config) -> dict[str, str]:
    similarity, plan = facts["similarity"], facts["plan"]
    planned_by = similarity["updates"] if config.plan.measure == "updates" else similarity
    cka_LL, updates_LL = (_array(some["cka"]) for some in (similarity, similarity["updates"]))
    threshold = config.plan.threshold if config.goes_by_threshold else None
    figures = {
        "cka": similarity_figure(cka_LL, plan),
        "updates": similarity_figure(updates_LL, plan),
        "neighbours": neighbours_figure(_array(planned_by["cka"]), _array(planned_by["stderr"]), plan, threshold),
        "influence": influence_figure(
            _array(similarity["block_influence"]), _array(similarity["block_influence_stderr"]), plan
        ),
    }
    if facts["comparison"]:
        figures["plans"] = plans_figure(facts["comparison"])
    if facts["retrain"]:
        curves = facts["retrain"]
        figures["losses"] = losses_figure(curves["loss"], curves["validation_loss"], facts["facts"].unit)
    if facts["rounds"]:
        figures["rounds"] = rounds_figure(facts["rounds"]["record"])
    return figures


def _array(values: Any) -> Any:
    """As float64, NaN where JSON says null; None if it says only that."""
    return None if values is None else np.array(values, np.float64)


def _repeated(data: dict[str, Any]) -> list[str]:
    """A sentence for each two parts that share records."""
    return [
        f"{count:,} records of {part} also stand in {other}."
        for part, content in data["parts"].items()
        for other, count in content["records_also_in"].items()
        if count
    ]


def _hub_id(path: str) -> str | None:
    """The model as the hub names it, unless it is a folder here."""
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path, re.ASCII) and not Path(path).expanduser().exists()
    return path if is_id else None


def _versions() -> list[tuple[str, str]]:
    found = [("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:  # a source tree that is not installed, say
            found.append((package, "not installed"))
    return found


def _machine() -> str:
    names = (platform.system(), platform.machine(), platform.processor())
    return ", ".join(dict.fromkeys(name for name in names if name))


def _write_card(folder: Path, render: Any, label: str) -> None:
    """Write README.md; one that came with the original model stays as ORIGINAL_README.md."""
    card, original = folder / "README.md", folder / "ORIGINAL_README.md"
    if card.exists() and not _is_ours(card):
        if original.exists() and original.read_bytes() != card.read_bytes():
            log.warning("%s is not ours, and ORIGINAL_README.md is taken: no model card is written there", card)
            return
        write_bytes(original, card.read_bytes())
    write_text(card, render(label=label, has_original=original.exists(), marker=CARD_MARKER))


def _is_ours(card: Path) -> bool:
    text = card.read_text(errors="replace")
    if text.startswith("---\n"):
        text = text.partition("\n---\n")[2]
    return text.lstrip().startswith(CARD_MARKER)
