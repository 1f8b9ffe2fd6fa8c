"""The stage `plan`: `cka.json` to `plan.json`; instant, no torch, unless plans are judged by their loss on workers."""

import json
import logging
from functools import partial
from typing import Any

from mpruner_dist.checkpoints.naming import layer_parameters
from mpruner_dist.config import PlanConfig
from mpruner_dist.config.plan import JUDGED
from mpruner_dist.config.task import FACTS
from mpruner_dist.plan import Plan, format_layers, read_plan
from mpruner_dist.road import Road, Step
from mpruner_dist.runs.commit import write_json
from mpruner_dist.runs.digest import file_digest
from mpruner_dist.runs.folder import Inputs

log = logging.getLogger(__name__)


def plan(road: Road) -> Step:
    """`cka.json` to `plan.json`: instant, no torch, unless plans are judged by their loss on workers."""
    section = road.config.plan
    inputs: Inputs = {
        "cka": file_digest(road.folder / "cka.json"),
        "plan": section.model_dump(mode="json"),
        "at_least": _floor(road),
        # not its bytes: it may be the run's own plan.json, which is about to be written anew
        "file": read_plan(section.file).kept if section.file and section.file.is_file() else None,
    }
    if section.method in JUDGED:
        inputs |= judged_inputs(road)

    def make() -> None:
        from mpruner_dist.planning.planner import make_plan

        given = measured(road, section)
        if section.preserve_pattern:
            given["pattern"] = _pattern(road)
        plan = _judged(road, given) if section.method in JUDGED else make_plan(**given)
        write_json(road.folder / "plan.json", plan.model_dump())
        log.info("  keeps layers %s of %d", format_layers(plan.kept), plan.num_layers)
        if plan.judged:
            log.info(
                "  loss %.4f without the others, %.4f with them: judged on %d %ss in %.1f passes",
                plan.judged["loss"], plan.judged["loss_of_the_whole_model"], plan.judged["tokens"],
                FACTS[road.config.model.task].unit, plan.judged["passes"],
            )  # fmt: skip

    return inputs, ("plan.json",), make


def measured(road: Road, section: PlanConfig) -> dict[str, Any]:
    """What `make_plan` is given of this run."""
    similarity = json.loads((road.folder / "cka.json").read_text())
    sizes = layer_parameters(road.checkpoint, similarity["layers"])
    stream = similarity if section.measure == "states" else similarity["updates"]
    return {
        "cka": stream["cka"],
        "config": section,
        "stderr": stream["stderr"],
        "influence": similarity["block_influence"],
        "angular": similarity["angular_distance"],
        "parameters": sizes,
        "other_parameters": road.checkpoint.num_parameters - sum(sizes),
        "at_least": _floor(road),
        "stacks": road.stacks(),
    }


def judged_inputs(road: Road) -> Inputs:
    """What the losses of plans depend on."""
    return {
        "model": road.model_id,
        "dtype": road.config.model.dtype,
        "validation": road.text("validation"),
        "batch_size": road.config.evaluate.batch_size,
        **road.rounding(),
    }


def judging_blocks(road: Road) -> int:
    """How many blocks of the validation part plans are judged on."""
    blocks = road.num_blocks("validation")
    return min(blocks, road.config.plan.judge_blocks or blocks)


def judge(road: Road, texts: dict[str, tuple[int, int]], task: Any, passes: float) -> dict[str, Any]:
    """Run a task that asks for losses on all workers, and return its result.

    Losses are kept in the run folder by what they depend on: a killed task goes on, and others use them again.

    Args:
        road: of the run.
        texts: by name, the first block of the validation part and the end.
        task: called with a function by each of these names, which makes the losses on that text.
        passes: about how many forward passes it will ask for.
    """
    from mpruner_dist.planning.judge import judge_job

    work = (road.run or road).work("plan", judged_inputs(road))  # a round after a roll back begins from the same model
    road.on_workers(
        "plan", judge_job, model=road.source, blocks=road.blocks("validation"), work=work, texts=texts, task=task,
        passes=passes,
    )  # fmt: skip
    result: dict[str, Any] = json.loads((work / "result.json").read_text())
    return result


def _floor(road: Road) -> int:
    """How many layers stay whatever a threshold says: the budget of all rounds."""
    return (road.run.config.plan.keep_layers or 1) if road.run else 1


def _judged(road: Road, given: dict[str, Any]) -> Plan:
    from mpruner_dist.planning.budget import Budget
    from mpruner_dist.planning.greedy import greedy_passes
    from mpruner_dist.planning.planner import judged_plan

    section = road.config.plan
    budget = Budget(section, given["stacks"], given["parameters"], given["other_parameters"])
    passes = section.passes if section.method == "search" else greedy_passes(budget.most, budget.least())
    return Plan.model_validate(
        judge(road, {"losses": (0, judging_blocks(road))}, partial(judged_plan, **given), passes)
    )


def _pattern(road: Road) -> Any:
    from mpruner_dist.data.model_folder import read_config
    from mpruner_dist.models.loading import empty_model
    from mpruner_dist.models.serving import kinds_and_pattern
    from mpruner_dist.rewriting.shrink import Skeleton, pattern_of_places

    remote_code = road.config.model.trust_remote_code
    config = read_config(road.source, remote_code)
    whole = Skeleton(road.checkpoint.config, config, empty_model(config, remote_code))
    return kinds_and_pattern(config) or pattern_of_places(whole, remote_code)
