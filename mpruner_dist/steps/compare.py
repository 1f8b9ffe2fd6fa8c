"""Beside the road: all planners at equal depth, `compare.json`. The run's plan is not touched."""

import logging
from functools import partial

from mpruner_dist.config.task import FACTS
from mpruner_dist.errors import UserError
from mpruner_dist.planning.budget import protected_layers
from mpruner_dist.road import Road
from mpruner_dist.runs.commit import write_json, write_text
from mpruner_dist.runs.digest import file_digest
from mpruner_dist.steps.plan import judge, measured

log = logging.getLogger(__name__)


def compare(road: Road, depths: list[int] | None) -> None:
    """Write `compare.json` and `figures/plans.svg`: the plan of every planner at each depth, and its loss.

    Planners judge on the first part of the validation text, and are compared on the rest.

    Args:
        road: of a run whose similarities are collected.
        depths: how many layers to remove; None takes some up to a third.

    Raises:
        UserError: no validation text, too little of it, or too many layers to remove.
    """
    from mpruner_dist.planning.comparison import COMPARED, compare_planners
    from mpruner_dist.planning.greedy import greedy_passes
    from mpruner_dist.reporting.comparison import plans_figure

    section = road.config.plan
    given = measured(road, section)
    layers = len(given["cka"])
    free = layers - max(len(protected_layers(given["stacks"], section)), 1)
    depths = depths or default_depths(layers, free)
    if not 1 <= min(depths) <= max(depths) <= free:
        raise UserError(
            f"--depths {','.join(map(str, depths))}: from 1 to {free} of {layers} layers can go "
            f"({layers - free} stay by plan.protect_first, plan.protect_last, as the first of a stack, or alone)"
        )
    judged, end = split(road)
    passes = greedy_passes(free, max(depths)) + section.passes * len(depths) + len(COMPARED) * len(depths)
    log.info("comparing %d planners at %d depths, about %d forward passes", len(COMPARED), len(depths), passes)
    task = partial(compare_planners, given=given, depths=depths)
    content = judge(road, {"judged": (0, judged), "held_out": (judged, end)}, task, passes)
    content["unit"] = FACTS[road.config.model.task].unit
    content["cka"] = file_digest(road.folder / "cka.json")
    write_json(road.folder / "compare.json", content)
    write_text(road.folder / "figures/plans.svg", plans_figure(content))


def split(road: Road) -> tuple[int, int]:
    """How many blocks of the validation part to judge on, and the number of all: the rest is held out.

    Raises:
        UserError: nothing would be held out.
    """
    if road.config.data.validation is None:
        raise UserError("--compare measures the loss of plans: it needs data.validation")
    blocks = road.num_blocks("validation")
    judged = road.config.plan.judge_blocks or (blocks + 1) // 2
    if judged >= blocks:
        raise UserError(
            f"--compare judges on {judged} blocks of the validation part and compares on the rest, and the run has "
            f"{blocks} of it: lower plan.judge_blocks, or give data.validation more text and raise evaluate.max_blocks"
        )
    return judged, blocks


def default_depths(layers: int, free: int) -> list[int]:
    """At most six numbers of layers, up to a third of them, and to those that can go."""
    most = max(min(layers // 3, free), 1)
    step = -(-most // 5)
    return list(range(step, most + 1, step))
