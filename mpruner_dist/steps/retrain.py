"""The stage `retrain`: the pruned checkpoint to the retrained one, on the workers."""

from mpruner_dist.cluster.settings import read_deepspeed_config
from mpruner_dist.errors import UserError
from mpruner_dist.road import Road, Step
from mpruner_dist.runs.folder import Inputs


def retrain(road: Road) -> Step:
    """The pruned checkpoint to the retrained one, on the workers."""
    section = road.config.retrain
    if section is None:
        raise UserError("there is no retrain section in the configuration")
    inputs: Inputs = {
        "model": road.model_id,
        "teacher": road.original_id,
        "kept": road.plan().kept,
        "dtype": road.config.model.dtype,
        "train": road.text("train"),
        "validation": road.text("validation"),
        "retrain": section.model_dump(exclude={"save_every", "deepspeed"}),
        "deepspeed": read_deepspeed_config(section.deepspeed),
    }

    def make() -> None:
        from mpruner_dist.retraining.job import retrain_job, write_summary

        work = road.work("retrain", inputs)
        road.on_workers(
            "retrain", retrain_job, given=inputs["deepspeed"], pruned=road.folder / "pruned", teacher=road.original,
            train=road.blocks("train"), validation=road.blocks("validation"), work=work,
            target=road.folder / "retrained",
        )  # fmt: skip
        write_summary(work / "metrics.jsonl", road.folder / "retrain.json")

    return inputs, ("retrained", "retrain.json"), make
