"""DeepSpeed's universal checkpoints: one folder a parameter, from which a run goes on with any number of ranks.

DeepSpeed's own converter makes them. It unpickles the checkpoint, as DeepSpeed does whenever it resumes: give it only
checkpoints that you trust.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from mpruner_dist.errors import StageFailure


def convert_to_universal(step: Path, target: Path) -> None:
    """Write the universal form of the DeepSpeed checkpoint in `step` to the folder `target`.

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
        state = torch.load(path, map_location="cpu", weights_only=False)
        torch.save(state | {"module": {}, "param_shapes": []}, path)
