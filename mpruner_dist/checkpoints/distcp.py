"""The weights inside a torch distributed checkpoint (FSDP, torchtitan), as stretches of bytes.

`.metadata` says which chunks a tensor has and in which stretch of which file each lies; such a stretch is a file of
torch.save of its own.
"""

import math
from pathlib import Path
from typing import Any

from mpruner_dist.checkpoints.stored import Piece, StoredTensor
from mpruner_dist.checkpoints.torch_files import read_torch_file, unpickle
from mpruner_dist.errors import UserError

METADATA = ".metadata"
WRAPPERS = ("app.", "state_dict.", "module.", "_orig_mod.")
NOT_WEIGHTS = ("optim", "optimizer", "lr_scheduler", "dataloader", "train_state", "step", "rng")


def distcp_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All weights by name, without what training keeps beside them.

    Raises:
        UserError: damaged, or a tensor is divided other than by rows.
    """
    metadata = unpickle(folder / METADATA)
    try:
        entries: dict[str, Any] = metadata.state_dict_metadata
        places = {
            (key.fqn, tuple(getattr(key, "offset", None) or ())): info for key, info in metadata.storage_data.items()
        }
        tensors = {
            name: _tensor(folder, name, entry, places) for name, entry in entries.items() if hasattr(entry, "chunks")
        }
    except (AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{folder / METADATA} is not what torch.distributed.checkpoint writes: {error}") from error
    weights = {n: t for n, t in _unwrapped(tensors).items() if not n.startswith(NOT_WEIGHTS)}
    if not weights:
        raise UserError(f"{folder} holds no weights")
    return weights


def _tensor(folder: Path, name: str, entry: Any, places: dict[Any, Any]) -> StoredTensor:
    shape = tuple(entry.size)
    dtype, row = None, 0
    pieces: list[Piece] = []
    for chunk in sorted(entry.chunks, key=lambda chunk: tuple(chunk.offsets)):
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        if not math.prod(sizes):
            continue
        if sizes[1:] != shape[1:] or any(offsets[1:]) or (offsets and offsets[0] != row):
            raise UserError(
                f"{folder}: {name} is divided other than by rows (a chunk of {list(sizes)} at {list(offsets)} of "
                f"{list(shape)}): gather it with torch.distributed.checkpoint.format_utils.dcp_to_torch_save, and "
                "save the model's own state dict of it as pytorch_model.bin beside config.json"
            )
        row += sizes[0] if sizes else 1
        info = places[name, offsets] if (name, offsets) in places else places[name, ()]
        file = folder / info.relative_path
        if Path(info.relative_path).name != info.relative_path or not file.is_file():
            raise UserError(f"{folder / METADATA} names {info.relative_path!r}, which is no file beside it")
        part = read_torch_file(file, info.offset, info.offset + info.length)
        if not isinstance(part, StoredTensor) or part.shape != sizes:
            raise UserError(f"{file} does not hold at byte {info.offset} the chunk of {name} that the metadata tells")
        dtype = part.dtype
        pieces += part.pieces
    if dtype is None or (shape and row != shape[0]):
        raise UserError(f"{folder}: chunks of {name} are missing")
    return StoredTensor(dtype, shape, tuple(pieces))


def _unwrapped(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Names as the model has them: training saves {"model": ..., "optimizer": ...} or wraps the model."""
    changed = {}
    for name, tensor in tensors.items():
        for wrapper in WRAPPERS:
            name = name.removeprefix(wrapper)
        changed[name] = tensor
    inside = ("model.model.", "model.lm_head.", "model.transformer.", "model.gpt_neox.")
    if any(name.startswith(inside) for name in changed):
        changed = {
            n.removeprefix("model."): t
            for n, t in changed.items()
            if n.startswith("model.") or n.startswith(NOT_WEIGHTS)
        }
    return changed
