"""Sharded checkpoints of a training engine: complete, or not there."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from mpruner_dist.cluster.worker import Worker
from mpruner_dist.errors import UserError
from mpruner_dist.runs.commit import commit_folder, disk_errors, write_json

FACTS = "mpruner.json"


def save_checkpoint(worker: Worker, engine: Any, folder: Path, step: int) -> None:
    """Save what every worker holds as `step-NNNNNN`; older ones go only after it is complete."""
    tag = f"step-{step:06d}"
    saving = folder / "saving"
    with disk_errors(folder):
        engine.save_checkpoint(str(saving), tag=tag, save_latest=False, exclude_frozen_parameters=False)
    worker.barrier()
    if worker.is_first:
        write_json(saving / tag / FACTS, {"step": step, "workers": worker.world_size, "zero_stage": _stage(engine)})
        commit_folder(saving / tag, folder / tag)
        shutil.rmtree(saving)  # DeepSpeed leaves a script of its own there
        for older in _complete(folder):
            if older < step:
                shutil.rmtree(folder / f"step-{older:06d}")
    worker.barrier()


def load_checkpoint(worker: Worker, engine: Any, folder: Path) -> int:
    """Go on from the newest complete checkpoint; the step to do next, 0 without any.

    Raises:
        UserError: it was saved by another number of workers or another ZeRO stage.
    """
    steps = _complete(folder)
    worker.barrier()
    if not steps:
        return 0
    tag = f"step-{steps[-1]:06d}"
    facts = json.loads((folder / tag / FACTS).read_text())
    now = {"workers": worker.world_size, "zero_stage": _stage(engine)}
    for name, value in now.items():
        if facts[name] != value:
            raise UserError(
                f"{folder / tag} was saved with {name} {facts[name]}, this run has {value}: use the same again, or "
                f"delete {folder} to retrain from the start"
            )
    engine.load_checkpoint(str(folder), tag=tag)
    worker.log(f"resumes from {folder / tag}")
    return int(facts["step"])


def _stage(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def _complete(folder: Path) -> list[int]:
    matches = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*") if (path / FACTS).is_file())
    return sorted(int(match[1]) for match in matches if match)
