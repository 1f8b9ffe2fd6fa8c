"""The stages that measure models on the workers: `evaluate` on the test; `baseline` and `gate`, of rounds, before."""

from pathlib import Path

from mpruner_dist.checkpoints.folder import read_checkpoint, tokenizer_digests
from mpruner_dist.config import TaskConfig
from mpruner_dist.config.task import FACTS
from mpruner_dist.road import Road, Step
from mpruner_dist.runs.folder import Inputs
from mpruner_dist.steps.data import digests_of_files


def evaluate(road: Road) -> Step:
    """Quality, size and speed of each model on the test part."""
    models = {"original": road.source, "pruned": road.folder / "pruned"}
    if road.config.retrain is not None:
        models["retrained"] = road.folder / "retrained"
    if road.config.rounds is not None and not road.plan().dropped:  # no round was accepted
        models = {"original": road.source}
    return _measurement(road, "evaluate", "evaluation", models, "test")


def baseline(road: Road) -> Step:
    """The original on the validation part: what the rounds are measured against."""
    return _measurement(road, "baseline", "baseline", {"original": road.source}, "validation")


def gate(road: Road) -> Step:
    """What a round made, on the validation part."""
    return _measurement(road, "gate", "gate", {"candidate": road.result}, "validation")


def _measurement(road: Road, stage: str, artefact: str, models: dict[str, Path], part: str) -> Step:
    """Make `ARTEFACT.json`, one entry for each model."""
    section = road.config.evaluate
    tasks = section.tasks if part == "test" else ()
    in_rounds = road.config.rounds and road.config.rounds.task
    inputs: Inputs = {
        "models": {label: read_checkpoint(path).fingerprint() for label, path in models.items()},
        "dtype": road.config.model.dtype,
        part: road.text(part),
        "evaluate": section.model_dump(exclude={"tasks"}),
        **road.rounding(),
    }
    if tasks or in_rounds or FACTS[road.config.model.task].of_generated:  # what is asked is text
        inputs["tokenizer"] = tokenizer_digests(road.source)
    if tasks:
        inputs["tasks"] = [task_inputs(task) for task in tasks]
    if in_rounds:
        inputs["task"] = task_inputs(in_rounds)

    def make() -> None:
        from mpruner_dist.evaluation.job import evaluate_job, write_evaluation

        results = road.work(artefact, inputs)
        road.on_workers(
            stage, evaluate_job, models=models, original=road.original, blocks=road.blocks(part), tasks=tasks,
            results=results,
        )  # fmt: skip
        write_evaluation(results, list(models), road.folder / f"{artefact}.json")

    return inputs, (f"{artefact}.json",), make


def task_inputs(task: TaskConfig) -> Inputs:
    """What the value of a task of the harness depends on, beside the model."""
    files = {} if task.folder is None else {"files": digests_of_files(task.folder)}
    return task.model_dump(mode="json") | files
