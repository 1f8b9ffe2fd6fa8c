"""The stage `collect`: activations to HSIC sums to `cka.json`, on the workers."""

import logging
from functools import partial
from typing import Any

from mpruner_dist.checkpoints.naming import layer_parameters
from mpruner_dist.config import Config
from mpruner_dist.planning.budget import require_budget
from mpruner_dist.planning.clusters import open_decisions, stack_starts
from mpruner_dist.road import Road, Step
from mpruner_dist.runs.folder import Inputs

log = logging.getLogger(__name__)


def collect(road: Road) -> Step:
    """Activations to HSIC sums to `cka.json`, on the workers."""
    inputs: Inputs = {
        "model": road.model_id,
        "dtype": road.config.model.dtype,
        "calibration": road.text("calibration"),
        "collect": road.config.collect.model_dump(exclude={"save_every"}),
        **road.rounding(),
    }
    if road.config.collect.until == "settled":
        plan = road.config.plan
        inputs["settled"] = {"measure": plan.measure, "threshold": plan.threshold}

    def make() -> None:
        from mpruner_dist.data.model_folder import read_config
        from mpruner_dist.data.parts import load_part
        from mpruner_dist.models.naming import layer_names
        from mpruner_dist.models.positions import require_positions
        from mpruner_dist.retraining.requirements import require_retraining
        from mpruner_dist.similarity.collect import collect_job, require_pairs, require_samples
        from mpruner_dist.similarity.stage import is_settled, write_cka

        remote_code = road.config.model.trust_remote_code
        model_config = read_config(road.source, remote_code)
        require_retraining(road.config, road.original, road.checkpoint.config)  # now, not hours later
        require_samples(load_part(road.blocks("calibration")), road.config.collect)
        names = layer_names(road.checkpoint.tensors, model_config, remote_code)
        require_pairs(names)
        require_positions(model_config, road.config)
        layers = [layer for of_stack in names.values() for layer in of_stack]
        depths = {stack: len(of_stack) for stack, of_stack in names.items()}
        if road.config.rounds is None:
            sizes = layer_parameters(road.checkpoint, layers)
            others = road.checkpoint.num_parameters - sum(sizes)
            require_budget(road.config.plan, list(depths.values()), sizes, others)
        stacks = depths if len(names) > 1 else None
        decisions = _decisions(road.config, stacks) if "settled" in inputs else None
        sums = road.work("stats", inputs)
        measure = road.config.plan.measure
        road.on_workers(
            "collect", collect_job, blocks=road.blocks("calibration"), sums=sums, model=road.source,
            is_settled=partial(is_settled, stream=measure, decisions=decisions) if decisions else None,
        )  # fmt: skip
        target = road.folder / "cka.json"
        content = write_cka(sums, layers, target, road.config.collect, measure, decisions, stacks)
        _tell(content)

    return inputs, ("cka.json",), make


def _decisions(config: Config, stacks: dict[str, int] | None) -> Any:
    """What must be settled: the comparisons that a plan by the threshold rests on, stack by stack as it makes them."""
    starts = stack_starts(list((stacks or {}).values()))
    z = config.collect.settled_z
    return partial(open_decisions, threshold=config.plan.threshold, standard_errors=z, starts=starts)


def _tell(similarity: Inputs) -> None:
    """Say what a user should know of `cka.json` before planning by it."""
    done, asked = similarity["num_batches"], similarity["asked_batches"]
    if similarity["open"] == []:
        log.info("  settled after %d of %d batches", done, asked)
    elif similarity["open"]:
        log.warning("not settled after all %d batches: %d comparison(s) are open", asked, len(similarity["open"]))
    if similarity["dominated"]:
        log.warning(
            "few %ss dominate the similarity of %s: set collect.normalize true, or lower collect.outlier_norm",
            similarity["unit"], ", ".join(similarity["dominated"]),
        )  # fmt: skip
