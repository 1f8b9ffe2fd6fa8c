"""DeepSpeed's universal checkpoints: one folder a parameter, from which a run goes on with any number of ranks.

DeepSpeed's own converter makes them. It unpickles the checkpoint, as DeepSpeed does whenever it resumes: give it only
checkpoints that you trust.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mpruner_dist.errors import StageFailure


def convert_to_universal(step: Path, target: Path, stage: int | None = None) -> None:
    """Write the universal form of the DeepSpeed checkpoint in `step` to the folder `target`.

    Args:
        step: the folder with the checkpoint's files.
        target: a new folder.
        stage: the ZeRO stage that shall load it; None: the one that saved it.

    Raises:
        StageFailure: DeepSpeed cannot; with what it says.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(step), "--output_folder", str(target)]
    environment = {"DS_ACCELERATOR": "cpu"} | os.environ
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise StageFailure(
            f"DeepSpeed cannot convert {step} to a universal checkpoint: {said[-1] if said else 'no word'}"
        )
    if stage is not None:
        _complete_for(target, stage)


def _complete_for(folder: Path, stage: int) -> None:
    """Add what DeepSpeed 0.19.8 asks for when ZeRO stage 3 loads what stage 1 or 2 saved, or the other way round.

    They name the file of step counts and learning rates differently, look for the optimizer's steps in different
    places, and stages 1 and 2 want each tensor in a table.
    """
    path = folder / "zero" / "optimizer_state.pt"
    state = _load(path)
    was_partitioned = "optimizer_state_dict" in state
    if was_partitioned == (stage == 3):
        return
    if stage == 3:
        step = _load(next(iter(sorted(folder.glob("zero/*/step.pt")))))
        states, name = folder / "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"
        state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": state["param_groups"]}
    else:
        step = state.pop("optimizer_state_dict")["state"][0]["step"]
        states, name = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt"
        state = {key: value for key, value in state.items() if key != "fp32_flat_groups"}
        state["ds_version"] = _load(states)["ds_version"]
        for tensor in folder.glob("zero/*/*.pt"):
            torch.save({"param": _load(tensor)}, tensor)
        for parameter in sorted({tensor.parent for tensor in folder.glob("zero/*/fp32.pt")}):
            torch.save(step, parameter / "step.pt")
    torch.save(state, path)
    shutil.copyfile(states, folder / name)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)


def prune_universal(folder: Path, renamed: dict[str, str]) -> None:
    """Leave of a universal checkpoint the parameters that `renamed` names, with their moments, under the new names.

    The copies of the whole model beside them, which DeepSpeed does not read when it loads such a checkpoint, go.

    Args:
        folder: as `convert_to_universal` wrote it.
        renamed: old name -> new name of each tensor that stays; buffers and second names of tied weights do no harm.
    """
    zero, kept = folder / "zero", folder / "zero.kept"
    kept.mkdir()
    for entry in sorted(zero.iterdir()):
        name = entry.name.removeprefix("module.")
        if entry.is_file():  # what the optimizer has for all parameters
            entry.rename(kept / entry.name)
        elif name in renamed:
            entry.rename(kept / entry.name.replace(name, renamed[name]))
    shutil.rmtree(zero)
    kept.rename(zero)
    for path in folder.glob("*_model_states.pt"):
        state = _load(path)
        torch.save(state | {"module": {}, "param_shapes": []}, path)
