"""All planners at equal depth, on text that none of them was judged on. No torch, no processes."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mpruner_dist.config import PlanConfig
from mpruner_dist.config.plan import CLUSTERED, JUDGED
from mpruner_dist.errors import UserError
from mpruner_dist.planning.losses import Losses
from mpruner_dist.planning.planner import make_plan

COMPARED: dict[str, dict[str, Any]] = {
    **{
        f"{method}, keeps {keep}": {"method": method, "keep": keep}
        for method in CLUSTERED
        for keep in ("first", "last", "medoid")
    },
    **{method: {"method": method} for method in ("partition", "influence", "angular", "last", "random", *JUDGED)},
}
"""Planners by name, and the settings that make them."""
SHARED = {"measure", "protect_first", "protect_last", "seed", "passes"}
"""Settings that they take from the configuration."""


def compare_planners(
    judged: Callable[[], Losses], held_out: Callable[[], Losses], given: dict[str, Any], depths: list[int]
) -> dict[str, Any]:
    """The plan of every planner for each number of layers to remove, and its loss on held-out text.

    Args:
        judged: makes the losses by which planners may judge.
        held_out: makes the losses on other text.
        given: arguments of `make_plan`.
        depths: how many layers to remove.

    Returns:
        Content of `compare.json`; a loss that is not finite is None, as is the plan of a planner that refuses.
    """
    layers = len(given["cka"])
    planners: dict[str, dict[str, Any]] = {}
    for name, settings in COMPARED.items():
        planners[name] = {}
        for depth in depths:
            config = given["config"].model_dump(include=SHARED) | settings | {"keep_layers": layers - depth}
            try:
                plan = make_plan(**given | {"config": PlanConfig(**config), "losses": judged()})
            except UserError as error:
                planners[name][str(depth)] = {"dropped": None, "refused": str(error)}
                continue
            passes = plan.judged["passes"] if plan.judged else 0
            planners[name][str(depth)] = {"dropped": plan.dropped, "passes": passes}
    text = held_out()
    plans = [entry["dropped"] for by_depth in planners.values() for entry in by_depth.values() if entry["dropped"]]
    text.measure([[], *plans], text.batches)  # all at once, so that they can be measured side by side
    for by_depth in planners.values():
        for entry in by_depth.values():
            loss = text.loss(entry["dropped"]) if entry["dropped"] else np.inf
            entry["loss"] = loss if np.isfinite(loss) else None
    return {
        "layers": layers,
        "depths": depths,
        "judged_on_tokens": int(judged().tokens_B.sum()),
        "held_out_tokens": int(text.tokens_B.sum()),
        "loss_of_the_whole_model": text.loss([]),
        "planners": planners,
    }
