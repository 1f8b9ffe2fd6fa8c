"""The stage `retrain`: the pruned checkpoint to the retrained one, on the workers."""

from typing import Any

from mpruner_dist.cluster.settings import Settings, read_deepspeed_config
from mpruner_dist.errors import UserError
from mpruner_dist.road import Road, Step
from mpruner_dist.runs.folder import Inputs

SHAPE = {"save_every", "keep_checkpoints", "zero_stage", "micro_batch_size", "deepspeed"}
"""Of the section `retrain`, what says how the work is cut up and saved, not what comes out of it."""
DEEPSPEED_SHAPE = {
    # sizes: that of the global batch is in the section `retrain`, and must agree
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    # where tensors lie, and how they are moved and saved
    "zero_optimization", "activation_checkpointing", "aio", "checkpoint",
    # what is measured and printed
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler", "comms_logger",
    "tensorboard", "wandb", "comet", "csv_monitor",
}  # fmt: skip
"""The same of a DeepSpeed configuration: work goes on when these change, with losses equal but for rounding."""


def retrain(road: Road) -> Step:
    """The pruned checkpoint to the retrained one, on the workers."""
    section = road.config.retrain
    if section is None:
        raise UserError("there is no retrain section in the configuration")
    given = read_deepspeed_config(section.deepspeed)
    inputs: Inputs = {
        "model": road.model_id,
        "kept": road.plan().kept,
        "dtype": road.config.model.dtype,
        "train": road.text("train"),
        "validation": road.text("validation"),
        "retrain": section.model_dump(exclude=SHAPE),
        "deepspeed": _result_of(given),
    }

    def make() -> None:
        from mpruner_dist.retraining.job import retrain_job, write_summary
        from mpruner_dist.retraining.resume import prepare_resume
        from mpruner_dist.retraining.settings import training_settings

        work, workers = road.work("retrain", inputs), road.config.cluster.workers
        prepare_resume(work, training_settings(given, section, road.config.model.dtype, workers), workers)
        road.on_workers(
            "retrain", retrain_job, given=given, pruned=road.folder / "pruned", teacher=road.source,
            train=road.blocks("train"), validation=road.blocks("validation"), work=work,
            target=road.folder / "retrained",
        )  # fmt: skip
        write_summary(work / "metrics.jsonl", road.folder / "retrain.json")

    return inputs, ("retrained", "retrain.json"), make


def _result_of(given: Settings) -> dict[str, Any]:
    """What of a DeepSpeed configuration says what comes out: not the shape, but gradients that are rounded coarsely."""
    zero = given.get("zero_optimization")
    rounded = {key: value for key, value in zero.items() if "quantized" in key} if isinstance(zero, dict) else {}
    result = {key: value for key, value in given.items() if key not in DEEPSPEED_SHAPE}
    return result | ({"zero_optimization": rounded} if rounded else {})
