"""The stage `plan`: `cka.json` to `plan.json`; instant, no torch."""

import json
import logging
from typing import Any

from mpruner_dist.checkpoints.naming import layer_parameters
from mpruner_dist.plan import format_layers
from mpruner_dist.road import Road, Step
from mpruner_dist.runs.commit import write_json
from mpruner_dist.runs.digest import file_digest

log = logging.getLogger(__name__)


def plan(road: Road) -> Step:
    """`cka.json` to `plan.json`: instant, no torch."""
    given = road.config.plan.file
    floor = (road.run.config.plan.keep_layers or 1) if road.run else 1  # the budget of all rounds
    inputs = {
        "cka": file_digest(road.folder / "cka.json"),
        "plan": road.config.plan.model_dump(mode="json"),
        "at_least": floor,
        "file": file_digest(given) if given and given.is_file() else None,
    }

    def make() -> None:
        from mpruner_dist.planning.planner import make_plan

        similarity = json.loads((road.folder / "cka.json").read_text())
        prefix = similarity["layers"][0].rpartition(".")[0]
        sizes = layer_parameters(road.checkpoint, prefix, len(similarity["layers"]))
        measured = similarity if road.config.plan.measure == "states" else similarity["updates"]
        plan = make_plan(
            measured["cka"],
            road.config.plan,
            stderr=measured["stderr"],
            influence=similarity["block_influence"],
            angular=similarity["angular_distance"],
            parameters=sizes,
            other_parameters=road.checkpoint.num_parameters - sum(sizes),
            pattern=_pattern(road) if road.config.plan.preserve_pattern else None,
            at_least=floor,
        )
        write_json(road.folder / "plan.json", plan.model_dump())
        log.info("  keeps layers %s of %d", format_layers(plan.kept), plan.num_layers)

    return inputs, ("plan.json",), make


def _pattern(road: Road) -> Any:
    from mpruner_dist.models.loading import read_config
    from mpruner_dist.models.serving import kinds_and_pattern

    return kinds_and_pattern(read_config(road.source, road.config.model.trust_remote_code))
