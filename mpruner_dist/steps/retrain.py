"""The stage `retrain`: the pruned checkpoint to the retrained one, on the workers."""

from collections.abc import Callable
from functools import partial
from typing import Any

from mpruner_dist.checkpoints.folder import read_checkpoint, tokenizer_digests
from mpruner_dist.checkpoints.source import resolve_source
from mpruner_dist.cluster.settings import Settings, quantized, read_deepspeed_config
from mpruner_dist.config import RetrainConfig
from mpruner_dist.errors import UserError
from mpruner_dist.retraining.freezing import beside_gaps
from mpruner_dist.retraining.settings import hidden_size, training_settings
from mpruner_dist.rewriting.finished import forget_request
from mpruner_dist.road import Road, Step
from mpruner_dist.runs.folder import Inputs

SHAPE = {
    "save_every", "keep_checkpoints", "zero_stage", "micro_batch_size", "activation_checkpointing", "deepspeed",
    "log_to",
}  # fmt: skip
"""Of the section `retrain`, what says how the work is cut up, saved and told, not what comes out of it.

But of a model with batch normalisation a micro-batch is what is normalised together: its size then counts.
"""
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
    section, dtype = road.config.retrain, road.config.model.dtype
    if section is None:
        raise UserError("there is no retrain section in the configuration")
    plan, distillation = road.plan(), section.distillation
    teacher = None
    if distillation is not None:
        teacher = resolve_source(distillation.teacher, None) if distillation.teacher else road.original
    given = read_deepspeed_config(section.deepspeed)
    inputs: Inputs = {
        "model": road.model_id,
        "kept": plan.kept,
        "teacher": None if teacher is None else read_checkpoint(teacher).fingerprint(),
        "dtype": dtype,
        "train": road.text("train"),
        "validation": road.text("validation"),
        "retrain": section.model_dump(exclude=SHAPE),
        "deepspeed": _result_of(given),
    }

    if any(name.endswith(".running_mean") for name in road.checkpoint.tensors):
        inputs["micro_batch_size"] = section.micro_batch_size

    def make() -> None:
        from mpruner_dist.retraining.job import retrain_job, write_summary
        from mpruner_dist.retraining.requirements import require_retraining
        from mpruner_dist.retraining.resume import prepare_resume

        width = hidden_size(road.checkpoint.config)
        settings = partial(training_settings, given, section, dtype, width=width)
        require_retraining(road.config, road.original, road.checkpoint.config)
        layers = beside_gaps(plan.kept, road.stacks()) if section.trainable == "neighbours" else None
        words = None
        if distillation is not None and distillation.cache:
            # the same teacher in all rounds
            words = (road.run or road).work("retrain/teacher", {
                **{name: inputs[name] for name in ("teacher", "dtype", "train")},
                "words": [distillation.top_k, distillation.temperature],
                "order": [section.steps, section.batch_size, section.seed],
            })  # fmt: skip
        work = road.work("retrain", inputs)
        road.on_workers(
            "retrain", retrain_job, given=given, usable=partial(_can_share, section, settings),
            prepare=lambda workers: prepare_resume(work, settings(workers), workers),
            pruned=road.folder / "pruned", layers=layers, teacher=teacher,
            teacher_layers=[road.layer_of_original(layer) for layer in plan.kept], words=words,
            train=road.blocks("train"), validation=road.blocks("validation"), work=work,
            target=road.folder / "retrained",
        )  # fmt: skip
        forget_request(road.folder / "retrained")
        write_summary(work, road.folder / "retrain.json")

    # whose change needs another export, and no other training
    return inputs | {"tokenizer": tokenizer_digests(road.source)}, ("retrained", "retrain.json"), make


def _can_share(section: RetrainConfig, settings: Callable[[int], Settings], workers: int) -> bool:
    """Whether so many workers can share a step; `settings` makes their DeepSpeed configuration."""
    if section.batch_size % (workers * section.micro_batch_size):
        return False
    try:
        settings(workers)
    except UserError:  # the user's own JSON fixes another number of micro-batches
        return False
    return True


def _result_of(given: Settings) -> dict[str, Any]:
    """What of a DeepSpeed configuration says what comes out: not the shape, but gradients that are rounded coarsely."""
    rounded = quantized(given)
    # "auto" is what the run would fill in without it, and the number type is the run's
    result = {key: value for key, value in given.items() if key not in DEEPSPEED_SHAPE and value != "auto"}
    for key in ("bf16", "fp16"):
        if isinstance(given.get(key), dict):
            result[key] = {name: value for name, value in given[key].items() if name != "enabled"}
    result = {key: value for key, value in result.items() if value != {}}
    return result | ({"zero_optimization": rounded} if rounded else {})
