"""The weights of a live model as a copy of the folder it was loaded from: same files, same names, new values."""

import shutil
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mpruner_dist.checkpoints.folder import CheckpointFolder
from mpruner_dist.checkpoints.header import TensorInfo, build_header
from mpruner_dist.checkpoints.slices import TORCH_DTYPES, read_slice
from mpruner_dist.errors import Fruitless, StageFailure
from mpruner_dist.runs.commit import disk_errors

Gather = Callable[..., AbstractContextManager[object]]
"""Called with parameters by all workers; inside, each of them is whole."""


@dataclass(frozen=True)
class Weight:
    """Where the new value of a tensor comes from."""

    parameter: torch.Tensor
    """Or a buffer, such as the running mean of a batch normalisation."""
    frozen: bool = False
    """The parameter must still have the value in the file, whose own bytes are then written."""
    beside: tuple[torch.nn.Parameter, ...] = ()
    """What `added` is made of."""
    added: Callable[[], torch.Tensor] | None = None
    """What is to be added to a frozen value."""
    asked: bool = True
    """False: the model does not ask for the tensor, such as one that older versions saved; its bytes stay."""


NOT_ASKED_FOR = Weight(torch.empty(0), frozen=True, asked=False)


@dataclass
class Exported:
    """What the tensors of an export were: elements and tensors, counted by the writer; buffers are not counted."""

    trained_tensors: int = 0
    trained_parameters: int = 0
    changed_tensors: int = 0
    """Trained tensors that differ from the file's."""
    frozen_tensors: int = 0
    frozen_parameters: int = 0
    proved_tensors: int = 0
    """Parameters that must not move and were found equal to the file's, byte by byte; bases of adapters too."""


def match_names(
    model: torch.nn.Module,
    checkpoint: CheckpointFolder,
    base: str,
    renamed: dict[str, str] | None = None,
    unasked: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """The parameter, or the buffer, of every tensor in the checkpoint that the model asks for.

    Args:
        model: in memory.
        checkpoint: that it was loaded from.
        base: the model's own name, which names in the checkpoint may leave out.
        renamed: other names that tensors have in memory.
        unasked: tensors that were not loaded.

    Raises:
        StageFailure: a tensor that is no parameter of the model under its name, or a parameter that has no tensor.
    """
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    matched = {}
    for name, info in checkpoint.tensors.items():
        if name in unasked:
            continue
        known = (name, f"{base}.{name}", (renamed or {}).get(name, name))
        parameter = next((tensors[some] for some in known if some in tensors), None)
        if parameter is None or info.dtype not in TORCH_DTYPES:
            raise StageFailure(
                f"{checkpoint.path}: tensor {name} ({info.dtype}) is no parameter of the model in memory, so that its "
                "retrained value could not be written back: this family cannot be retrained yet"
            )
        matched[name] = parameter
    written = {id(parameter) for parameter in matched.values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in written:
            raise StageFailure(
                f"{checkpoint.path}: no tensor is the model's parameter {name}, so that its retrained value could not "
                "be written back: this family cannot be retrained yet"
            )
    return matched


def export_weights(
    weights: dict[str, Weight], checkpoint: CheckpointFolder, target: Path, gather: Gather, is_writer: bool
) -> Exported:
    """Write `checkpoint`'s folder anew with these values; all workers call it, one writes.

    One tensor at a time is whole in memory. Values are cast to the dtype that they have in the files.

    Raises:
        Fruitless: a value is not finite.
        StageFailure: the disk is full, a parameter has not the shape of its tensor, or a frozen one has moved.
    """
    counts = Exported()
    with disk_errors(target):
        if is_writer:
            shutil.rmtree(target, ignore_errors=True)  # of an export that was stopped: perhaps under other names
            target.mkdir(parents=True)
            for file in sorted(checkpoint.path.iterdir()):
                if file.is_dir():
                    shutil.copytree(file, target / file.name)
                elif file.name not in checkpoint.shards:
                    shutil.copyfile(file, target / file.name)
        for shard, header in checkpoint.shards.items():
            with ExitStack() as stack:
                writer = stack.enter_context((target / shard).open("wb")) if is_writer else None
                if writer:
                    writer.write(build_header(list(header.tensors.values()), header.metadata))
                for name, info in header.tensors.items():
                    weight = weights[name]
                    with gather(weight.parameter, *weight.beside):
                        if writer:
                            value = _new_value(weight, info, checkpoint.path / shard, counts)
                            writer.write(_raw_bytes(value).numpy().data)
    return counts


def _new_value(weight: Weight, info: TensorInfo, path: Path, counts: Exported) -> torch.Tensor:
    """The tensor to write, flat, in the dtype of the file, or its bytes."""
    if not weight.asked:  # whatever its dtype is
        stored = torch.empty(info.num_bytes, dtype=torch.uint8)
        read_slice(path, replace(info, dtype="U8"), 0, stored)
        counts.frozen_tensors += 1
        counts.frozen_parameters += info.num_elements
        return stored
    name, parameter = info.name, weight.parameter.detach()
    if tuple(parameter.shape) != info.shape:  # such as [0]: ZeRO-3 leaves that of a weight that was not gathered
        raise StageFailure(f"{name} has shape {list(parameter.shape)} in memory and {list(info.shape)} in {path}")
    value = parameter.cpu().reshape(-1)
    stored = torch.empty(info.num_elements, dtype=TORCH_DTYPES[info.dtype])
    read_slice(path, info, 0, stored)
    if weight.frozen:
        if not torch.equal(_raw_bytes(value), _raw_bytes(stored.to(value.dtype))):
            raise StageFailure(
                f"{name} was to stay frozen and is not what it is in {path}: this is a bug; nothing was exported"
            )
        counts.proved_tensors += 1
        if weight.added is None:
            counts.frozen_tensors += 1
            counts.frozen_parameters += info.num_elements
            return stored
        sum_dtype = torch.promote_types(stored.dtype, torch.float32)
        value = stored.to(sum_dtype) + weight.added().detach().cpu().reshape(-1).to(sum_dtype)
        before = stored
    else:  # what the model was given of it: in a narrower type, rounded
        before = stored.to(value.dtype).to(stored.dtype)
    value = value.to(stored.dtype)
    if not torch.isfinite(value).all():
        raise Fruitless(f"{name} is not finite after retraining: lower retrain.learning_rate; nothing was exported")
    if isinstance(weight.parameter, torch.nn.Parameter):  # what forward passes gather changes without any training
        counts.trained_tensors += 1
        counts.trained_parameters += info.num_elements
        counts.changed_tensors += not torch.equal(_raw_bytes(value), _raw_bytes(before))
    return value


def _raw_bytes(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().view(torch.uint8)
