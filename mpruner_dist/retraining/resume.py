"""Before the workers start: can they go on from what is saved, and in which form?"""

import logging
import shutil
from pathlib import Path

from mpruner_dist.cluster.settings import Settings, zero_stage
from mpruner_dist.cluster.universal import convert_to_universal
from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.retraining.checkpoints import Facts, fits, newest_whole, read_facts, universal_tag, write_facts
from mpruner_dist.runs.commit import commit_folder, disk_errors, require_space

log = logging.getLogger(__name__)
NO_MOMENTS = "a retraining cannot go on from its checkpoints (DeepSpeed 0.19.8 loads none of the moments)"


def prepare_resume(folder: Path, settings: Settings, workers: int) -> None:
    """Where the newest whole checkpoint was saved by another number of workers or ZeRO stage, make its universal form.

    Without one, warn of a training that could not go on from its own.

    Args:
        folder: of the checkpoints.
        settings: the DeepSpeed configuration of the workers that will start.
        workers: their number.

    Raises:
        UserError: DeepSpeed cannot load it, or not in that shape.
        StageFailure: DeepSpeed cannot convert it, or no space.
    """
    facts = newest_whole(folder, log.warning)
    stage = zero_stage(settings)
    offload = settings.get("zero_optimization", {}).get("offload_optimizer") or {}
    on_nvme = offload.get("device") == "nvme"
    if facts is None:
        if on_nvme:
            log.warning("with its optimizer on NVMe, %s: a stop begins it anew", NO_MOMENTS)
        return
    checkpoint, target = folder / f"step-{facts['step']:06d}", folder / universal_tag(facts["step"])
    if on_nvme or any(name.startswith("offloaded_tensors") for name in facts["files"]):
        raise UserError(
            f"{checkpoint} was saved, or would go on, with the optimizer on NVMe, where {NO_MOMENTS}. Delete "
            f"{folder} to retrain from the start, best with the optimizer in CPU memory"
        )
    if fits(facts, workers, stage):
        return
    _require_universal(checkpoint, facts, settings, workers)
    known, harm = read_facts(target)
    if harm is None and known["zero_stage"] == stage:
        return
    log.info("  DeepSpeed converts %s, of %s, for %s", checkpoint, _shape(facts["workers"], facts["zero_stage"]),
             _shape(workers, stage))  # fmt: skip
    converting = folder / "converting"
    with disk_errors(folder):
        shutil.rmtree(converting, ignore_errors=True)
        # float32 weights and two moments, and once more as fragments while DeepSpeed converts
        require_space(folder, 2 * sum(size for size, _ in facts["files"].values()))
        try:
            convert_to_universal(checkpoint, converting / target.name, stage)
        except StageFailure as error:
            raise StageFailure(f"{error}. {_way_out(checkpoint, facts)}") from error
        write_facts(converting / target.name, {k: v for k, v in facts.items() if k != "files"} | {"zero_stage": stage})
        commit_folder(converting / target.name, target)
        shutil.rmtree(converting)


def _require_universal(checkpoint: Path, facts: Facts, settings: Settings, workers: int) -> None:
    stage = zero_stage(settings)
    if 0 in (stage, facts["zero_stage"]):
        raise UserError(
            f"{checkpoint} was saved by {_shape(facts['workers'], facts['zero_stage'])}, this run has "
            f"{_shape(workers, stage)}, and DeepSpeed's universal checkpoints are of ZeRO stage 1 to 3. "
            f"{_way_out(checkpoint, facts)}"
        )


def _shape(workers: int, stage: int) -> str:
    return f"{workers} worker{'s' if workers > 1 else ''} under ZeRO stage {stage}"


def _way_out(checkpoint: Path, facts: Facts) -> str:
    return (
        f"Use cluster.workers {facts['workers']} and ZeRO stage {facts['zero_stage']} again, or delete "
        f"{checkpoint.parent} to retrain from the start"
    )
