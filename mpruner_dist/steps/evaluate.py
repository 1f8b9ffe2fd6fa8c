"""The stage `evaluate`: quality, size and speed of each model, on the workers."""

from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.road import Road, Step


def evaluate(road: Road) -> Step:
    """Quality, size and speed of each model, on the workers."""
    models = {"original": road.source, "pruned": road.folder / "pruned"}
    if road.config.retrain is not None:
        models["retrained"] = road.folder / "retrained"
    inputs = {
        "models": {label: read_checkpoint(path).fingerprint() for label, path in models.items()},
        "dtype": road.config.model.dtype,
        "test": road.text("test"),
        "evaluate": road.config.evaluate.model_dump(),
    }

    def make() -> None:
        from mpruner_dist.evaluation.job import evaluate_job, write_evaluation

        results = road.work("evaluation", inputs)
        road.on_workers("evaluate", evaluate_job, models=models, blocks=road.blocks("test"), results=results)
        write_evaluation(results, list(models), road.folder / "evaluation.json")

    return inputs, ("evaluation.json",), make
