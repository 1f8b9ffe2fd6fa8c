"""Sharded checkpoints of a training engine: complete and unharmed, or not used.

step-NNNNNN/            what DeepSpeed wrote, the running means of batch normalisations, which a universal checkpoint
                        lacks, and mpruner.json: who saved it, and every file with size and digest
step-NNNNNN.torn/       one whose files are not as they were saved; goes once a newer one is complete
universal-step-NNNNNN/  the same step for another number of workers or ZeRO stage (`resume.py`)
saving/, converting/    being written; removed by whoever comes next
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from mpruner_dist.cluster.settings import Settings, zero_stage
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.errors import UserError
from mpruner_dist.retraining.preparation import running_means
from mpruner_dist.runs.commit import commit_folder, disk_errors, write_bytes, write_json
from mpruner_dist.runs.digest import digest, spot_digest

FACTS = "mpruner.json"
MEANS = "running_means.safetensors"
Facts = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from: the steps that are done, and whether to load its universal form."""

    step: int
    universal: bool

    @property
    def tag(self) -> str:
        """Its folder's name."""
        return universal_tag(self.step) if self.universal else _tag(self.step)


def save_checkpoint(worker: Worker, engine: Any, folder: Path, step: int, keep: int) -> None:
    """Save what every worker holds as `step-NNNNNN`; all but the newest `keep` go once it is complete."""
    saving = folder / "saving"
    with disk_errors(folder):
        engine.save_checkpoint(str(saving), tag=_tag(step), save_latest=False, exclude_frozen_parameters=False)
    worker.barrier()
    if worker.is_first:
        if means := running_means(engine.module):
            content = {name: buffer.cpu().contiguous() for name, buffer in means.items()}
            write_bytes(saving / _tag(step) / MEANS, save(content))
        facts = {
            "step": step,
            "run": folder.name,
            "workers": worker.world_size,
            "zero_stage": int(engine.zero_optimization_stage()),
            "architecture": _architecture(engine),
        }
        write_facts(saving / _tag(step), facts)
        commit_folder(saving / _tag(step), folder / _tag(step))
        shutil.rmtree(saving)  # DeepSpeed leaves a script of its own there
        _rotate(folder, step, keep)
    worker.barrier()


def write_facts(checkpoint: Path, facts: Facts) -> None:
    """Describe a checkpoint that is written but not yet in its place, file by file."""
    files = {
        str(path.relative_to(checkpoint)): [path.stat().st_size, spot_digest(path)]
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    write_json(checkpoint / FACTS, facts | {"files": files})


def newest_whole(folder: Path, say: Callable[[str], None]) -> Facts | None:
    """Facts of the newest checkpoint whose files are as they were saved; None without any. One process calls it.

    What a killed process left half-written is removed, torn checkpoints are put aside; `say` hears of them.

    Raises:
        UserError: a checkpoint of another run lies in the folder.
    """
    for left in (folder / "saving", folder / "converting", *folder.glob(".*step-*.old")):
        shutil.rmtree(left, ignore_errors=True)
    torn = False
    for step in _steps(folder):
        checkpoint = folder / _tag(step)
        facts, harm = read_facts(checkpoint)
        if harm is None and facts["run"] != folder.name:
            raise UserError(f"{checkpoint} was saved by another run, {facts['run']}: move it out of {folder}")
        if harm is None:
            return facts
        torn = True
        aside = checkpoint.with_name(f"{checkpoint.name}.torn")
        commit_folder(checkpoint, aside)
        say(f"the checkpoint {checkpoint} is torn, {harm}: it now is {aside.name}, and the one before is used")
    if torn:
        say(f"no whole checkpoint is left in {folder}: retraining begins anew")
    return None


def read_facts(checkpoint: Path) -> tuple[Facts, str | None]:
    """What a checkpoint says of itself, and what is wrong with its files; cut or missing files are always noticed."""
    try:
        facts: Facts = dict(json.loads((checkpoint / FACTS).read_text()))
        for name in ("step", "run", "workers", "zero_stage", "architecture"):
            facts[name]
        for name, (size, spots) in facts["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return {}, f"{name} is missing"
            if path.stat().st_size != size:
                return {}, f"{name} has {path.stat().st_size} bytes of {size}"
            if spot_digest(path) != spots:
                return {}, f"{name} has other content than was saved"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"{FACTS} cannot be read ({type(error).__name__}: {error})"
    return facts, None


def find_checkpoint(worker: Worker, folder: Path, settings: Settings) -> Found | None:
    """The checkpoint that all workers go on from, chosen by the first of them.

    Raises:
        UserError: it lies there neither for this number of workers and this ZeRO stage nor in its universal form.
    """
    step, universal = -1, 0
    if worker.is_first:
        facts = newest_whole(folder, worker.say)
        if facts is not None:
            step = facts["step"]
            universal = int(not fits(facts, worker.world_size, zero_stage(settings)))
    step, universal = worker.from_first(step, universal)
    if step < 0:
        return None
    found = Found(step, bool(universal))
    if not (folder / found.tag).is_dir():
        raise UserError(
            f"{folder / _tag(step)} was saved by another number of workers or ZeRO stage, and {found.tag}, its "
            "universal form, is not there: give the same command again, which makes it"
        )
    return found


def fits(facts: Facts, workers: int, stage: int) -> bool:
    """Whether a checkpoint can be loaded as it is."""
    return bool(facts["workers"] == workers and facts["zero_stage"] == stage)


def loading_settings(found: Found | None, settings: Settings) -> Settings:
    """The DeepSpeed configuration of an engine that shall load this checkpoint."""
    universal = found is not None and found.universal
    return settings | {"checkpoint": settings.get("checkpoint", {}) | {"load_universal": universal}}


def load_checkpoint(worker: Worker, engine: Any, folder: Path, found: Found | None) -> int:
    """Load what `find_checkpoint` found; the step to do next.

    Raises:
        UserError: it is of a model with other parameters.
    """
    if found is None:
        return 0
    facts = json.loads((folder / found.tag / FACTS).read_text())
    if facts["architecture"] != _architecture(engine):
        raise UserError(
            f"{folder / found.tag} holds a model whose parameters have other names or shapes than the pruned one: "
            "it is of another run; move it away"
        )
    own = [dict(group) for group in engine.optimizer.param_groups]
    engine.load_checkpoint(str(folder), tag=found.tag)
    if found.universal:
        _mend_optimizer(engine, own)
    if means := running_means(engine.module):
        saved = load((folder / _tag(found.step) / MEANS).read_bytes())
        for name, buffer in means.items():
            buffer.copy_(saved[name])
    worker.log(f"resumes from {folder / found.tag}")
    return found.step


def _mend_optimizer(engine: Any, own: list[dict[str, Any]]) -> None:
    """Undo what ZeRO stage 3 of DeepSpeed 0.19.8 does to an optimizer when it loads a universal checkpoint.

    All groups get the settings of the first one, and all parts one tensor in common that counts steps: each would count
    it up. `own` are the groups as they were before; their rates come from the scheduler.
    """
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    if len(own) > 1:
        rates = engine.lr_scheduler.get_lr()
        for group, before, rate in zip(engine.optimizer.param_groups, own, rates, strict=True):
            group.update({key: value for key, value in before.items() if key != "params"} | {"lr": rate})


def universal_tag(step: int) -> str:
    """Name of the folder of a checkpoint's universal form."""
    return f"universal-{_tag(step)}"


def _architecture(engine: Any) -> str:
    """Digest of the names and whole shapes of all parameters, and of which are trained."""
    return digest([
        [name, list(getattr(parameter, "ds_shape", parameter.shape)), parameter.requires_grad]
        for name, parameter in engine.module.named_parameters()
    ])  # fmt: skip


def _rotate(folder: Path, step: int, keep: int) -> None:
    """Remove what is older than the newest `keep` checkpoints up to `step`, which is complete, and what was torn."""
    kept = [older for older in _steps(folder) if older <= step][:keep]
    for path in folder.glob("*step-*"):
        number = _step_of(path)
        if number is None or (number <= step and number not in kept):
            shutil.rmtree(path)


def _tag(step: int) -> str:
    return f"step-{step:06d}"


def _step_of(path: Path) -> int | None:
    match = re.fullmatch(r"(?:universal-)?step-(\d+)", path.name)
    return int(match[1]) if match else None


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that stand in their place, newest first."""
    return sorted(
        (int(path.name.removeprefix("step-")) for path in folder.glob("step-*") if path.suffix == ""), reverse=True
    )
