"""Rounds, as MPruner publishes them (arXiv 2408.13482): prune, retrain, measure; accept, or roll back and prune less.

Each round is a walk of the road in a folder of its own, `round-01` and so on, from the last model that was accepted.
The loop keeps no state but `rounds.json`, which it can write anew from the rounds' own artefacts: the same command
resumes.
"""

import json
import logging
from dataclasses import dataclass
from typing import Any

from mpruner_dist.config import CLUSTERED, Config, RoundsConfig
from mpruner_dist.config.task import IN_PERCENT, LESS_IS_BETTER
from mpruner_dist.errors import Fruitless, NoneFits, UserError
from mpruner_dist.plan import Plan
from mpruner_dist.planning.budget import protected_layers
from mpruner_dist.reporting.table import value_text
from mpruner_dist.road import Road
from mpruner_dist.runs.commit import write_json
from mpruner_dist.runs.folder import RunFolder
from mpruner_dist.steps import ROUND_STEPS, STEPS

log = logging.getLogger(__name__)

ROUNDING = 1e-9
"""0.92 - 0.9 is more than 0.02, a little."""


@dataclass(frozen=True)
class Base:
    """A model that rounds start from."""

    round: int
    """The round that made it; 0 is the original."""
    path: str
    layers: list[int]
    """Its layers, by their numbers in the original."""


def prune_in_rounds(road: Road, again: bool = False) -> None:
    """Walk round after round until one of the reasons to stop; then put the result into the run folder.

    Stops where a plan removes nothing, the budget of layers is reached or would take the first layer of a stack, no
    stride is left, or after `max_rounds`.

    Args:
        road: of the whole run, whose text is made.
        again: where the result, or the original's measures, were made from other inputs, make them anew.

    Raises:
        UserError: the input is wrong, or the folder was made by another configuration.
        StageFailure: a stage could not finish.
    """
    config = _rounds(road.config)
    _walk(road, ["baseline"], again)
    original = json.loads((road.folder / "baseline.json").read_text())["original"]
    if (keep := road.config.plan.keep_layers or 1) >= original["layers"]:
        raise UserError(f"plan.keep_layers: rounds end at {keep} layers, and the model has only {original['layers']}")
    _require_measure(config, original)
    base, stride = Base(0, road.config.model.path, list(range(original["layers"]))), 1
    history: list[dict[str, Any]] = []
    rejected: list[tuple[int, list[int]]] = []
    folders: dict[int, RunFolder] = {}
    stacks = 1
    while not (stop := _reason_to_stop(road.config, base, stacks, stride, len(history))):
        number = len(history) + 1
        current = _begin_round(road, number, base, stride, folders)
        stacks = len(current.stacks())
        if history and (stop := _too_few(current, len(base.layers))):
            break
        no_plan = _came_to_nothing(current, "plan")
        if not no_plan and not current.plan().dropped:
            stop = _why_none_go(current.plan())
            break
        kept = base.layers if no_plan else [base.layers[layer] for layer in current.plan().kept]
        entry: dict[str, Any] = {
            "round": number, "folder": current.folder.path.name, "base": base.round, "stride": stride,
            "removed": [layer for layer in base.layers if layer not in kept], "kept": kept, "accepted": False,
        }  # fmt: skip
        if no_plan:
            entry["why"] = no_plan
        elif (base.round, kept) in rejected:
            entry["why"] = "the plan is that of a round that was rolled back"
        else:
            entry |= _measure(current, config, original)
        history.append(entry)
        if entry["accepted"]:
            base = Base(number, str(current.result), entry["kept"])
        else:
            rejected.append((base.round, kept))
            stride += 1
        log.info("round %d  %s: %s", number, "accepted" if entry["accepted"] else "rolled back", entry["why"])
        _write(road, config, original, history, "")
    _write(road, config, original, history, stop)
    log.info("rounds    end: %s", stop)
    if base.round == 0:
        log.warning("no round was accepted: the original is kept as it is")
    _walk(road, ["result"], again)


def _reason_to_stop(config: Config, base: Base, stacks: int, stride: int, done: int) -> str:
    """Why no further round is begun; empty if one is. `stacks`: how many the layers are in."""
    rounds = _rounds(config)
    if done == rounds.max_rounds:
        return f"rounds.max_rounds: {done} rounds are done"
    if stride > rounds.max_stride:
        return f"no stride is left: at stride {rounds.max_stride} a round was rolled back too"
    if len(base.layers) <= (config.plan.keep_layers or 1):
        return f"the budget is reached: {len(base.layers)} layers are left"
    if len(base.layers) <= stacks:
        return f"one layer is left in each of the {stacks} stacks"
    return ""


def _begin_round(road: Road, number: int, base: Base, stride: int, folders: dict[int, RunFolder]) -> Road:
    """Collect; where an earlier round began from the same model, its similarities are taken over."""
    config = round_config(road.config, base, stride)
    folder = RunFolder(road.folder / f"round-{number:02d}", config.to_yaml())
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    log.info(
        "round %d  from %s with %d layers, stride %d",
        number, f"round {base.round}" if base.round else "the original", len(base.layers), stride,
    )  # fmt: skip
    if base.round in folders:
        folder.adopt("collect", folders[base.round])
    folders[base.round] = folder
    current = Road(config, folder, run=road, layers=base.layers)
    _walk(current, ["collect"])
    return current


def _too_few(road: Road, depth: int) -> str:
    """Why a round would have to remove layers that always stay; empty if it need not."""
    if (keep := road.config.plan.keep_layers) is None:
        return ""
    stay = len(protected_layers(road.stacks(), road.config.plan))
    if keep >= stay:
        return ""
    return (
        f"{depth} layers are left, {stay} of which always stay, by plan.protect_first, plan.protect_last or as the "
        f"first of a stack: a round would keep {keep}"
    )


def round_config(config: Config, base: Base, stride: int) -> Config:
    """What a round is asked to do: another model, and a plan as gentle as the stride."""
    if config.plan.method in CLUSTERED:
        changes = {"stride": stride, "keep_layers": None}
    else:
        removed = -(-(_rounds(config).remove or 1) // stride)
        changes = {"keep_layers": max(config.plan.keep_layers or 1, len(base.layers) - removed)}
    plan = config.plan.model_copy(update=changes)
    model = config.model.model_copy(update={"path": base.path})
    return config.model_copy(update={"plan": plan, "model": model})


def _came_to_nothing(road: Road, stage: str) -> str:
    """Make a stage of a round; why nothing came of it, which is not tried again, or "" if it is done."""
    try:
        # a gate, which is quick, may be made anew: the baseline was, when the evaluation was asked for otherwise
        _walk(road, [stage], again=stage == "gate")
    except (Fruitless, NoneFits) as error:
        road.folder.give_up(stage, str(error))
        return str(error)
    return ""


def _why_none_go(plan: Plan) -> str:
    """Why a plan removes nothing."""
    if any(len(cluster) > 1 for cluster in plan.clusters):
        return (
            "the layers that are alike always stay, by the stride, by plan.protect_first, plan.protect_last or as the "
            "first of a stack"
        )
    return "no layers are alike enough: every cluster is a single layer"


def _measure(road: Road, config: RoundsConfig, original: dict[str, Any]) -> dict[str, Any]:
    """Rewrite, retrain and measure what the plan leaves, and decide."""
    for stage in ("rewrite", *(["retrain"] if road.config.retrain is not None else []), "gate"):
        if why := _came_to_nothing(road, stage):
            return {"accepted": False, "why": why}
    candidate = json.loads((road.folder / "gate.json").read_text())["candidate"]
    share = of_a_share(config, original)
    change = candidate[config.metric] - original[config.metric]
    if share:
        change /= original[config.metric]
    lost = change if less_is_better(config, original) else -change
    return {
        "layers": candidate["layers"],
        "parameters": candidate["parameters"],
        "metric": candidate[config.metric],
        "change": change_text(config.metric, change, share),
        "accepted": lost <= config.tolerance + ROUNDING,
        "seconds": sum(stage.get("seconds", 0.0) for stage in road.folder.stages.values()),
        "why": f"{config.metric} {value_text(config.metric, original[config.metric])} -> "
        f"{value_text(config.metric, candidate[config.metric])}, {change_text(config.metric, change, share)}, where "
        f"{limit_text(config, share)}",
    }


def _require_measure(config: RoundsConfig, original: dict[str, Any]) -> None:
    """Refuse what no share can be taken of.

    Raises:
        UserError: the original's value is not above 0 where the tolerance is a share of it, or not above the tolerance.
    """
    value, share = original[config.metric], of_a_share(config, original)
    if not less_is_better(config, original) and value <= config.tolerance:
        raise UserError(
            f"{config.metric} of the original is {value:.4g}, and rounds.tolerance {config.tolerance:g} would let all "
            "of it be lost: lower the tolerance, or choose another rounds.metric"
        )
    if config.task and share and value <= 0:
        raise UserError(
            f"{original['task_metric']} of the task {config.task.name} is {original['task']:g} for the original, and "
            f"rounds.tolerance {config.tolerance:g} is a share of it, as of every task of which less is better: "
            "choose another rounds.task.metric or another task"
        )


def less_is_better(config: RoundsConfig, original: dict[str, Any]) -> bool:
    """Whether the metric is one that grows with the damage."""
    return config.metric in LESS_IS_BETTER or bool(original.get("task_less_is_better", False))


def of_a_share(config: RoundsConfig, original: dict[str, Any]) -> bool:
    """Whether the tolerance is a share of the original's value: where less is better, but for a share of words."""
    return config.metric != "word_error_rate" and less_is_better(config, original)


def change_text(metric: str, change: float, share: bool) -> str:
    """A change of the metric, as a share of the original's or as a difference."""
    if share:
        return f"{100 * change:+.1f} %"
    return f"{100 * change:+.2f} points" if metric in IN_PERCENT else f"{change:+.4f}"


def limit_text(config: RoundsConfig, share: bool) -> str:
    """What change is tolerated."""
    if share:
        return f"at most {100 * config.tolerance:+g} % is tolerated"
    lost = "a rise" if config.metric in LESS_IS_BETTER else "a loss"
    points = 100 * config.tolerance
    in_points = f"{points:g} point{'' if points == 1 else 's'}"
    most = in_points if config.metric in IN_PERCENT else f"{config.tolerance:g}"
    return f"{lost} of at most {most} is tolerated"


def _write(
    road: Road, config: RoundsConfig, original: dict[str, Any], history: list[dict[str, Any]], stop: str
) -> None:
    share, before = of_a_share(config, original), original[config.metric]
    tolerated = config.tolerance * (before if share else 1)
    content = {
        "metric": config.metric,
        "task": f"{config.task.name} {original['task_metric']}" if config.task else None,
        "tolerance": config.tolerance,
        "limit": limit_text(config, share),
        "worst": before + tolerated if less_is_better(config, original) else before - tolerated,
        "original": {name: original[name] for name in ("layers", "parameters", config.metric)},
        "rounds": history,
        "stopped": stop or None,
    }
    write_json(road.folder / "rounds.json", content)


def _walk(road: Road, names: list[str], again: bool = False) -> None:
    for name in names:
        inputs, outputs, make = (STEPS | ROUND_STEPS)[name](road)
        anew = "make it anew here with the same options: mpruner evaluate CONFIG"
        remedy = f"delete {road.folder.path} and the rounds after it, and run again" if road.run else anew
        road.folder.stage(name, inputs, outputs, make, remedy=remedy, replace=again)


def _rounds(config: Config) -> RoundsConfig:
    if config.rounds is None:
        raise ValueError("the configuration has no rounds")
    return config.rounds
