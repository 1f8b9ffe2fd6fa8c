"""How the layers of a plan were chosen, and why each of them, in words and rows."""

from typing import Any

from mpruner_dist.config import PlanConfig, RoundsConfig
from mpruner_dist.plan import Plan
from mpruner_dist.reporting.table import parameters_text

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]

ALIKE = ("removed layer", "resembles layer", "CKA", "standard error")
COLUMNS = {
    "block_influence": "block influence",
    "angular_distance_of_the_window": "angular distance across all of them",
    "step": "step",
    "loss_before": "loss before, nats",
    "loss_after": "loss after",
    "cost": "rise of the loss by its removal, nats",
}
"""Headings of what a plan's reasons may say beside the CKA."""

CLUSTERS = {
    "anchor": "as published by MPruner (arXiv 2408.13482): a cluster grows while the CKA of the next layer with the "
    "first layer of the cluster is at least {threshold}.",
    "chain": "a cluster grows while the CKA of the next layer with the last layer of the cluster is at least "
    "{threshold}.",
    "complete": "neighbouring clusters become one while the CKA of all their layers with each other is at least "
    "{threshold}.",
}
KEPT = {"first": "its first layer", "last": "its last layer", "medoid": "the layer most like its others"}
OTHERS = {
    "partition": "of all divisions of the network into groups of consecutive layers, each group standing for its first "
    "layer, the one that loses least was taken. The loss is the sum over the removed layers of 1 - CKA with the first "
    "layer of their group.",
    "influence": "the layers of lowest block influence were removed (ShortGPT, arXiv 2403.03853): those that turn the "
    "states least.",
    "angular": "of all windows of so many consecutive layers the one was removed that turns the states least, by the "
    "angle between what its first layer is given and what its last hands on (arXiv 2403.17887).",
    "last": "the last layers that may go were removed, whatever they do.",
    "random": "the layers were drawn at random.",
    "greedy": "one layer after another was removed, each time the one without which the loss on validation data is "
    "lowest, with all that were left measured anew (as in SLEB, arXiv 2402.09025).",
    "search": "layers were removed one after another by how much that raises the loss on validation data, measured "
    "anew only where it could change the choice; the better of that plan and those of block influence, partition and "
    "angular distance was then improved by swaps while forward passes were left. The rise of the loss below is an "
    "estimate, partly from a part of the text.",
}


def choice(config: PlanConfig, plan: Plan, rounds: RoundsConfig | None = None, unit: str = "token") -> list[str]:
    """How the layers were chosen, in sentences; a loss on text was judged on so many of `unit`."""
    if config.method == "file":
        return [f"The layers were given: the plan is {config.file}."]
    if rounds is not None and config.method in CLUSTERS:
        budget = ""  # the number of layers is where the rounds end
    elif rounds is not None:
        budget = f", {rounds.remove} layers a round and less after a roll back"
    elif config.keep_layers is not None:
        budget = f", with a budget of {config.keep_layers} layers"
    elif config.target_parameters is not None:
        budget = f", with a budget of at most {parameters_text(config.target_parameters)} parameters"
    else:
        budget = ""
    if config.method not in CLUSTERS:
        words = OTHERS[config.method]
    elif rounds is None:
        words = _clustered(config, bool(budget))
    else:
        words = (
            f"{CLUSTERS[config.method].format(threshold=f'{config.threshold:g}')} Of each cluster "
            f"{KEPT[config.keep]} stays; of the others, counted from there, each round removed the 1st and every "
            "further one at its stride."
        )
    how = [f"Method {config.method}{budget}: {words}" if budget else f"Method {config.method}, {words}"]
    if plan.judged:
        of = "tokens of validation text" if unit == "token" else f"validation {unit}s"
        how.append(
            f"Judged on {plan.judged['tokens']:,} {of} in {plan.judged['passes']:.1f} forward "
            f"passes over them: loss {plan.judged['loss_of_the_whole_model']:.4f} with all layers, "
            f"{plan.judged['loss']:.4f} without these, before any retraining."
        )
    if config.protect_first or config.protect_last:
        ends = f"{config.protect_first} at the start and {config.protect_last} at the end of each stack"
        how.append(f"Layers never removed, whatever their similarity: {ends}.")
    return how


def _clustered(config: PlanConfig, budget: bool) -> str:
    threshold = "a threshold, the highest that lets enough layers go" if budget else f"{config.threshold:g}"
    words = CLUSTERS[config.method].format(threshold=threshold)
    if budget:
        return f"{words} Of each cluster {KEPT[config.keep]} stays; of the others those most like it were removed."
    if config.keep == "first":
        which = {1: "all but the first", 2: "layers 1, 3, 5, ...", 3: "layers 1, 4, 7, ..."}[config.stride]
        return f"{words} Of the layers 0, 1, 2, ... of each cluster, {which} were removed (stride {config.stride})."
    which = {
        1: "",
        2: " Of the others, counted from there, the 1st, 3rd, 5th, ... were removed.",
        3: " Of the others, counted from there, the 1st, 4th, 7th, ... were removed.",
    }[config.stride]
    return f"{words} Of each cluster {KEPT[config.keep]} stays.{which}"


def reasons(plan: Plan, known_spread: bool) -> Table:
    """Headings and a row for each dropped layer; a plan by hand may say less."""
    stated = [plan.reasons.get(str(layer), "not stated") for layer in plan.dropped]
    keys = [key for key in COLUMNS if any(isinstance(reason, dict) and key in reason for reason in stated)]
    if keys:
        return ("removed layer", *(COLUMNS[key] for key in keys)), [
            (str(layer), *(_decimal(reason.get(key, "")) for key in keys)) if isinstance(reason, dict)
            else (str(layer), str(reason), *[""] * (len(keys) - 1))
            for layer, reason in zip(plan.dropped, stated, strict=True)
        ]  # fmt: skip
    if not any(isinstance(reason, dict) for reason in stated):
        return ("removed layer", "reason"), [
            (str(layer), str(reason)) for layer, reason in zip(plan.dropped, stated, strict=True)
        ]
    rows: list[tuple[str, ...]] = []
    for layer, reason in zip(plan.dropped, stated, strict=True):
        if isinstance(reason, dict):
            stderr = _decimal(reason.get("stderr", "")) if known_spread else "unknown"
            rows.append((str(layer), str(reason.get("like", "")), _decimal(reason.get("cka", "")), stderr))
        else:
            rows.append((str(layer), str(reason), "", ""))
    return ALIKE, rows


def _decimal(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
