"""The weights of a live model as a copy of the folder it was loaded from: same files, same names, new values."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import torch

from mpruner_dist.checkpoints.folder import CheckpointFolder
from mpruner_dist.checkpoints.header import TensorInfo, build_header
from mpruner_dist.checkpoints.slices import TORCH_DTYPES
from mpruner_dist.errors import StageFailure
from mpruner_dist.runs.commit import disk_errors

Gather = Callable[[torch.nn.Parameter], AbstractContextManager[object]]


def match_names(model: torch.nn.Module, checkpoint: CheckpointFolder, base: str) -> dict[str, torch.nn.Parameter]:
    """The parameter of every tensor in the checkpoint, whose names may leave out the model's own (`base`).

    Raises:
        StageFailure: a tensor that is no parameter of the model under its name.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    matched = {}
    for name, info in checkpoint.tensors.items():
        parameter = parameters.get(name, parameters.get(f"{base}.{name}"))
        if parameter is None or info.dtype not in TORCH_DTYPES:
            raise StageFailure(
                f"{checkpoint.path}: tensor {name} ({info.dtype}) is no parameter of the model in memory, so that its "
                "retrained value could not be written back: this family cannot be retrained yet"
            )
        matched[name] = parameter
    return matched


def export_weights(
    parameters: dict[str, torch.nn.Parameter],
    checkpoint: CheckpointFolder,
    target: Path,
    gather: Gather,
    is_writer: bool,
) -> None:
    """Write `checkpoint`'s folder anew with these parameters' values; all workers call it, one writes.

    One tensor at a time is whole in memory. Values are cast to the dtype that they have in the files.

    Raises:
        StageFailure: the disk is full, or a parameter has not the shape of its tensor.
    """
    with disk_errors(target):
        if is_writer:
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(checkpoint.path.iterdir()):
                if file.is_file() and file.name not in checkpoint.shards:
                    shutil.copyfile(file, target / file.name)
        for shard, header in checkpoint.shards.items():
            with ExitStack() as stack:
                writer = stack.enter_context((target / shard).open("wb")) if is_writer else None
                if writer:
                    writer.write(build_header(list(header.tensors.values()), header.metadata))
                for name, info in header.tensors.items():
                    with gather(parameters[name]):
                        if writer:
                            writer.write(_raw_bytes(name, parameters[name], info))


def _raw_bytes(name: str, parameter: torch.nn.Parameter, info: TensorInfo) -> bytes:
    if tuple(parameter.shape) != info.shape:
        raise StageFailure(
            f"{name} has shape {list(parameter.shape)} in memory and {list(info.shape)} in the checkpoint"
        )
    value = parameter.detach().to("cpu", TORCH_DTYPES[info.dtype]).contiguous()
    if not torch.isfinite(value).all():
        raise StageFailure(f"{name} is not finite after retraining: lower retrain.learning_rate; nothing was exported")
    return value.reshape(-1).view(torch.uint8).numpy().tobytes()
