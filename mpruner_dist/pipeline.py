"""The road, walked once; or in rounds, for which see `rounds.py`.

calibration text -> activations -> HSIC sums -> CKA -> plan -> rewritten checkpoint
    -> retraining -> evaluation -> report
"""

import logging
from pathlib import Path

from mpruner_dist.config import Config
from mpruner_dist.errors import UserError
from mpruner_dist.evaluation.extras import require_extras
from mpruner_dist.road import Road
from mpruner_dist.rounds import prune_in_rounds
from mpruner_dist.runs.folder import Inputs, RunFolder, open_run
from mpruner_dist.steps import ROUND_STEPS, STEPS
from mpruner_dist.steps.compare import compare

log = logging.getLogger(__name__)

COMMANDS = {name: name for name in STEPS} | {"data": "collect", "rewrite": "plan"}
"""The command that makes a finished stage anew when its inputs changed."""
OF_A_ROUND = ("collect", "plan", "rewrite", "retrain")
"""Stages that rounds walk themselves."""


def run(
    config: Config, run_dir: Path, *, last: str = "report", again: bool = False, collected: Path | None = None
) -> Path:
    """Walk the road up to the stage `last`; what is done already, from the same inputs, is not done again.

    Args:
        config: what to do.
        run_dir: where every artefact goes.
        last: the stage to stop after.
        again: if the inputs of `last` changed, make it anew; stages that this outdates are made by the next run.
        collected: another run folder, whose similarities are taken over if they were made from the same inputs.

    Returns:
        The run folder.

    Raises:
        UserError: the input is wrong, or the folder was made by another configuration.
        StageFailure: a stage could not finish.
    """
    require_way(config, last, collected)
    require_extras(config)
    with open_run(run_dir, config.to_yaml()) as folder:
        require_same_road(config, folder)
        with Road(config, folder) as road:
            _walk(road, last, again, collected)
    return folder.path


def require_way(config: Config, last: str, collected: Path | None) -> None:
    """Refuse an end or a beginning that a run of this configuration cannot have; see `run`.

    Raises:
        UserError: which, and what can be given in its place.
    """
    if collected is not None and config.rounds is not None:
        raise UserError("rounds measure similarities of their own: leave out --collected")
    if config.rounds is not None and last in OF_A_ROUND:
        raise UserError(
            f"with rounds, the stage {last} belongs to a round: give `mpruner run`, or --set rounds=null to walk the "
            "road once, in a run folder of its own"
        )
    if last not in (stages := stages_of(config)):
        raise UserError(f"there is no stage {last!r} to stop after; this run has {', '.join(stages)}")
    if collected is not None:
        _similarities_of(collected)


def _walk(road: Road, last: str, again: bool, collected: Path | None) -> None:
    config, folder, stages = road.config, road.folder, stages_of(road.config)
    position = stages.index(last) + 1
    for name in stages[:position]:
        if name == "evaluate" and config.rounds is not None:
            prune_in_rounds(road, again and last == name)
        inputs, outputs, make = STEPS[name](road)
        if name == "collect" and collected is not None:
            take_over(folder, inputs, collected)
        # in rounds, `mpruner collect` is refused
        command = "evaluate" if name == "data" and config.rounds is not None else COMMANDS[name]
        remedy = f"make it anew here with the same options: mpruner {command} CONFIG"
        replace = name == "report" or (again and command == last)  # a report only tells of what is there
        folder.stage(name, inputs, outputs, make, remedy=remedy, replace=replace)
    if again:
        forget_outdated(road, folder, stages[position:])


def take_over(folder: RunFolder, inputs: Inputs, collected: Path) -> None:
    """Take the similarities of another run over.

    Raises:
        UserError: there are none, or they were made from other inputs.
    """
    other = _similarities_of(collected)
    if differences := other.changes("collect", inputs):
        listed = "\n".join(f"  {line}" for line in differences)
        raise UserError(f"the similarities of {collected} were made from other inputs than this run's:\n{listed}")
    folder.adopt("collect", other)


def _similarities_of(collected: Path) -> RunFolder:
    other = RunFolder(collected, "")
    if not other.is_done("collect"):
        raise UserError(f"{collected} has no similarities to take over: its stage collect is not done")
    if missing := [output for output in other.stages["collect"]["outputs"] if not (other / output).exists()]:
        raise UserError(f"{collected} has no similarities to take over: {missing[0]} is missing")
    return other


def require_same_road(config: Config, folder: RunFolder) -> None:
    """Refuse a folder in which the road was walked once for rounds, and the other way round: both make `plan.json`.

    Raises:
        UserError: the folder holds the other's work.
    """
    once = [name for name in OF_A_ROUND if name in folder.stages]
    in_rounds = [name for name in ROUND_STEPS if name in folder.stages]
    if once and config.rounds is not None:
        raise UserError(f"{folder.path} holds the stage {once[0]} of a run without rounds: give a new --run-dir")
    if in_rounds and config.rounds is None:
        raise UserError(f"{folder.path} holds the stage {in_rounds[0]} of a run in rounds: give a new --run-dir")


def compare_plans(config: Config, run_dir: Path, depths: list[int] | None) -> Path:
    """Compare all planners at equal depth, on the similarities of a run, which are collected first if need be.

    The run's own plan stays as it is.

    Args:
        config: of the run.
        run_dir: where `compare.json` and `figures/plans.svg` go.
        depths: how many layers to remove; None takes some up to a third.

    Returns:
        The run folder.
    """
    path = run(config, run_dir, last="collect")
    with open_run(path, config.to_yaml()) as folder, Road(config, folder) as road:
        compare(road, depths)
        forget_outdated(road, folder, ("report",))
    return path


def stages_of(config: Config) -> tuple[str, ...]:
    """The stages that a configuration asks for, but for those of its rounds."""
    left_out = () if config.retrain is not None else ("retrain",)
    return tuple(name for name in STEPS if name not in (left_out if config.rounds is None else OF_A_ROUND))


def forget_outdated(road: Road, folder: RunFolder, stages: tuple[str, ...]) -> None:
    """Mark the first of these stages whose inputs changed, and those after it, as not done."""
    for index, name in enumerate(stages):
        if name not in folder.stages:
            return
        if folder.changes(name, STEPS[name](road)[0]):
            folder.forget(stages[index:])
            log.info("outdated, made again by the next `mpruner run`: %s", ", ".join(stages[index:]))
            return
