"""The header of a safetensors file, read and written without touching the tensors.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes little-endian length n, n bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}`, then the data, offsets counted
from its start.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpruner_dist.errors import UserError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in its file. `begin` and `end` are bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.begin

    @property
    def num_elements(self) -> int:
        """Elements of the tensor; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A parsed header: tensors in the order of their data, and the file's own metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Read and check a header: no tensor may lie outside the file, overlap another or leave a hole.

    Raises:
        UserError: the file is missing, truncated or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise UserError(f"{path} is truncated or no safetensors file: its header claims {length} bytes, "
                                f"the file has {size}; fetch it again")  # fmt: skip
            content = json.loads(file.read(length), object_pairs_hook=unique_keys)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no safetensors file: its header is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no safetensors file: its header is not a table of tensors")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: the header's __metadata__ is no table; fetch the file again")
    tensors = [_tensor_info(path, name, entry, 8 + length) for name, entry in content.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    position = 8 + length
    for tensor in tensors:
        if tensor.begin != position:
            raise UserError(f"{path}: tensor {tensor.name} begins at byte {tensor.begin}, expected {position}: "
                            "the header is damaged; fetch the file again")  # fmt: skip
        position = tensor.end
    if position != size:
        raise UserError(f"{path} is truncated: its tensors end at byte {position}, the file has {size}; fetch it again")
    return Header({tensor.name: tensor for tensor in tensors}, metadata)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object in which no key may come twice, for another tool might take the other value."""
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return content


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = (
            entry["dtype"],
            tuple(int(n) for n in entry["shape"]),
            entry["data_offsets"],
        )
        info = TensorInfo(name, dtype, shape, data_start + int(begin), data_start + int(end))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: the header's entry for {name} is damaged ({error}); fetch the file again") from error
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise UserError(f"{path}: tensor {name} has the unknown dtype {dtype!r}; known: {', '.join(DTYPE_BITS)}")
    if min(shape, default=0) < 0 or info.num_bytes * 8 != info.num_elements * DTYPE_BITS[dtype]:
        raise UserError(f"{path}: tensor {name} of shape {list(shape)} and dtype {dtype} cannot fill "
                        f"{info.num_bytes} bytes: the header is damaged; fetch the file again")  # fmt: skip
    return info


def build_header(tensors: list[TensorInfo], metadata: dict[str, str]) -> bytes:
    """Header bytes for tensors that follow one another in this order; only their sizes count, not their offsets."""
    content: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for tensor in tensors:
        content[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.num_bytes],
        }
        position += tensor.num_bytes
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text
