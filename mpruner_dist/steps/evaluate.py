"""The stages that measure models on the workers: `evaluate` on the test; `baseline` and `gate`, of rounds, before."""

from pathlib import Path

from mpruner_dist.checkpoints.folder import read_checkpoint
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
    return _evaluation(road, "evaluation", models, "test")


def baseline(road: Road) -> Step:
    """The original on the validation part: what the rounds are measured against."""
    return _evaluation(road, "baseline", {"original": road.source}, "validation")


def gate(road: Road) -> Step:
    """What a round made, on the validation part."""
    result = road.folder / ("pruned" if road.config.retrain is None else "retrained")
    return _evaluation(road, "gate", {"candidate": result}, "validation")


def _evaluation(road: Road, name: str, models: dict[str, Path], part: str) -> Step:
    """Make `NAME.json`, one entry for each model."""
    inputs: Inputs = {
        "models": {label: read_checkpoint(path).fingerprint() for label, path in models.items()},
        "dtype": road.config.model.dtype,
        part: road.text(part),
        "evaluate": road.config.evaluate.model_dump(),
    }
    task = road.config.rounds.task if road.config.rounds else None
    if task is not None:
        inputs["task"] = task.model_dump(mode="json")
    if task is not None and task.folder is not None:
        inputs["task_files"] = digests_of_files(task.folder)

    def make() -> None:
        from mpruner_dist.evaluation.job import evaluate_job, write_evaluation

        results = road.work(name, inputs)
        road.on_workers(
            "evaluate" if name == "evaluation" else name,
            evaluate_job,
            models=models,
            original=road.original,
            blocks=road.blocks(part),
            results=results,
        )
        write_evaluation(results, list(models), road.folder / f"{name}.json")

    return inputs, (f"{name}.json",), make
