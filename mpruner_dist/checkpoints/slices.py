"""Parts of a safetensors tensor, read straight to where they are needed."""

from io import FileIO
from pathlib import Path

import torch

from mpruner_dist.checkpoints.header import TensorInfo
from mpruner_dist.errors import UserError

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CHUNK = 1 << 22
"""Elements that are read at once where they must be cast, or copied to another device."""


def read_slice(path: Path, info: TensorInfo, begin: int, target: torch.Tensor) -> None:
    """Read elements [begin, begin + len(target)) of a tensor, counted as if it were flat, and cast them.

    On the CPU and in the file's own dtype nothing lies between the file and the target; else one chunk does.

    Args:
        path: the file.
        info: the tensor, as the file's header has it.
        begin: first element.
        target: contiguous, one-dimensional, any floating dtype, any device.

    Raises:
        UserError: the file ends early.
    """
    stored = TORCH_DTYPES[info.dtype]
    with path.open("rb", buffering=0) as file:
        file.seek(info.begin + begin * stored.itemsize)
        if target.dtype == stored and target.device.type == "cpu":
            _fill(file, path, info, target)
            return
        chunk = torch.empty(min(CHUNK, len(target)), dtype=stored)
        for start in range(0, len(target), CHUNK):
            part = chunk[: len(target) - start]
            _fill(file, path, info, part)
            target[start : start + len(part)].copy_(part)


def _fill(file: FileIO, path: Path, info: TensorInfo, target: torch.Tensor) -> None:
    left = target.view(torch.uint8).numpy().data
    while left:
        count = file.readinto(left)
        if not count:
            raise UserError(f"{path} ends inside the tensor {info.name}: it is truncated, fetch it again")
        left = left[count:]
