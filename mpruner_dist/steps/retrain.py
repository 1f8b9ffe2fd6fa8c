"""The stage `retrain`: the pruned checkpoint to the retrained one, on the workers."""

from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.checkpoints.source import resolve_source
from mpruner_dist.cluster.settings import read_deepspeed_config
from mpruner_dist.errors import UserError
from mpruner_dist.retraining.freezing import beside_gaps
from mpruner_dist.retraining.metrics import require_loggers
from mpruner_dist.retraining.settings import hidden_size, training_settings
from mpruner_dist.road import Road, Step
from mpruner_dist.runs.folder import Inputs


def retrain(road: Road) -> Step:
    """The pruned checkpoint to the retrained one, on the workers."""
    section, dtype = road.config.retrain, road.config.model.dtype
    if section is None:
        raise UserError("there is no retrain section in the configuration")
    plan, distillation = road.plan(), section.distillation
    teacher = None
    if distillation is not None:
        teacher = resolve_source(distillation.teacher, None) if distillation.teacher else road.original
    inputs: Inputs = {
        "model": road.model_id,
        "kept": plan.kept,
        "teacher": None if teacher is None else read_checkpoint(teacher).fingerprint(),
        "dtype": dtype,
        "train": road.text("train"),
        "validation": road.text("validation"),
        # what changes no result
        "retrain": section.model_dump(exclude={"save_every", "deepspeed", "log_to", "activation_checkpointing"}),
        "deepspeed": read_deepspeed_config(section.deepspeed),
    }

    def make() -> None:
        from mpruner_dist.retraining.job import retrain_job, write_summary
        from mpruner_dist.retraining.matching import require_fitting_teacher

        given = inputs["deepspeed"]
        training_settings(given, section, dtype, road.config.cluster.workers, hidden_size(road.checkpoint.config))
        require_loggers(section.log_to)
        layers = beside_gaps(plan.kept, plan.num_layers) if section.trainable == "neighbours" else None
        words = None
        if distillation is not None and teacher is not None:
            require_fitting_teacher(teacher, road.original, distillation, road.config.model.trust_remote_code)
            if distillation.cache:
                # the same teacher in all rounds
                words = (road.run or road).work("retrain/teacher", {
                    **{name: inputs[name] for name in ("teacher", "dtype", "train")},
                    "words": [distillation.top_k, distillation.temperature],
                    "order": [section.steps, section.batch_size, section.seed],
                })  # fmt: skip
        work = road.work("retrain", inputs)
        road.on_workers(
            "retrain", retrain_job, given=given, pruned=road.folder / "pruned", layers=layers, teacher=teacher,
            teacher_layers=[road.layer_of_original(layer) for layer in plan.kept], words=words,
            train=road.blocks("train"), validation=road.blocks("validation"), work=work,
            target=road.folder / "retrained",
        )  # fmt: skip
        write_summary(work, road.folder / "retrain.json")

    return inputs, ("retrained", "retrain.json"), make
