"""Where the tensors of a file of torch.save lie, told without running what is in it.

Such a file is a zip archive whose records are not compressed: `data.pkl` describes the objects, `data/N` are the bytes
of storage N. Unpickling can run any code; here every class is an inert stand-in, but for tensors and plain containers.
"""

import math
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mpruner_dist.checkpoints.header import DTYPE_BITS
from mpruner_dist.checkpoints.stored import Piece, StoredTensor
from mpruner_dist.errors import UserError

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip


# What the unpickler raises over bytes that are no pickle.
DAMAGED = (
    pickle.UnpicklingError, KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError, MemoryError,
    struct.error, zlib.error, NotImplementedError, RuntimeError,
)  # fmt: skip


class Inert:
    """Stands for an object of any class: keeps what it was made from, does nothing."""

    def __init__(self, *args: Any, **_: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def __call__(self, *args: Any, **_: Any) -> "Inert":
        """As functions and methods of such an object are called."""
        return Inert(*args)

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None:
        """As lists of a class of their own are filled."""

    def extend(self, items: Any) -> None:
        """Likewise."""


def read_torch_file(path: Path, begin: int = 0, end: int | None = None) -> Any:
    """The objects that torch.save wrote, each tensor a `StoredTensor`.

    Args:
        path: the file.
        begin: where the archive begins in it, for files that hold several.
        end: where it ends; None is the end of the file.

    Raises:
        UserError: no such archive, damaged, or older than torch 1.6.
    """
    try:
        with path.open("rb") as file:
            window = _Window(file, begin, path.stat().st_size if end is None else end)
            with zipfile.ZipFile(window) as archive:
                name = next(n for n in archive.namelist() if n == "data.pkl" or n.endswith("/data.pkl"))
                root = name.removesuffix("data.pkl")
                order = f"{root}byteorder"
                if order in archive.namelist() and archive.read(order) != b"little":
                    raise UserError(f"{path} was written on a big-endian machine: convert it to safetensors there")
                with archive.open(name) as records:
                    return _Reader(records, path, _Records(archive, window, root)).load()
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is damaged, or was saved by torch before 1.6 ({error}): fetch it again, or load and save it once "
            "with a newer torch"
        ) from error
    except (OSError, EOFError, StopIteration, *DAMAGED) as error:
        raise UserError(f"cannot read {path}: {type(error).__name__}: {error}; fetch it again") from error


def unpickle(path: Path) -> Any:
    """The objects of a bare pickle, every class of its own an inert stand-in with the attributes it was saved with.

    Raises:
        UserError: damaged.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, path).load()
    except (OSError, EOFError, *DAMAGED) as error:
        raise UserError(f"cannot read {path}: {type(error).__name__}: {error}; fetch it again") from error


class _Window:
    """A part of a file, as a file of its own."""

    def __init__(self, file: BinaryIO, begin: int, end: int) -> None:
        self.file, self.begin, self.size, self.position = file, begin, end - begin, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        self.file.seek(self.begin + self.position)
        content = self.file.read(left if count < 0 else min(count, left))
        self.position += len(content)
        return content


@dataclass(frozen=True)
class _Records:
    """The archive around a pickle."""

    archive: zipfile.ZipFile
    window: _Window
    root: str


class _Reader(pickle.Unpickler):
    def __init__(self, content: Any, path: Path, records: _Records | None = None) -> None:
        super().__init__(content)
        self.path, self.records = path, records

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and (name in DTYPES or name in STORAGES):
            return DTYPES.get(name) or STORAGES[name]
        if module.startswith("torch.storage") and name == "UntypedStorage":
            return "U8"
        makers = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._typed_tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch._tensor", "_rebuild_from_type_v2"): self._subclass,
        }
        if (module, name) in makers:
            return makers[module, name]
        return type(name, (Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        if self.records is None:
            raise pickle.UnpicklingError("a bare pickle has no storages")
        _, dtype, key, _, _ = pid
        window, info = self.records.window, self.records.archive.getinfo(f"{self.records.root}data/{key}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self.path} is compressed, as torch.save never does")
        window.seek(info.header_offset)
        header = window.read(30)  # the local header has a padding of its own
        begin = window.begin + info.header_offset + len(header)
        begin += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        end = begin + info.file_size
        if header[:4] != b"PK\x03\x04" or end > window.begin + window.size:
            raise UserError(f"{self.path} is damaged: the bytes of storage {key} are not where its table says")
        return dtype, Piece(self.path, begin, end)

    def _tensor(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Any:
        dtype, piece = storage
        return self._place(dtype, piece, offset, tuple(size), tuple(stride))

    def _typed_tensor(self, storage: Any, offset: int, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any,
                      *_: Any) -> Any:  # fmt: skip
        return self._place(dtype, storage[1], offset, tuple(size), tuple(stride))

    def _parameter(self, tensor: Any, *_: Any) -> Any:
        return tensor

    def _subclass(self, function: Any, _type: Any, args: Any, _state: Any) -> Any:
        return function(*args)

    def _place(self, dtype: str, piece: Piece, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Any:
        length = math.prod(list(shape))
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise UserError(f"{self.path} has a tensor of a dtype that safetensors does not know")
        expected = 1
        for size, step in zip(reversed(shape), reversed(stride), strict=True):
            if size != 1 and step != expected and length:
                return Inert("strides", shape, stride)  # told with its name where the name is known
            expected *= size
        width = DTYPE_BITS[dtype] // 8
        begin = piece.begin + offset * width
        end = begin + length * width
        if min(shape, default=0) < 0 or offset < 0 or end > piece.end:
            raise UserError(f"{self.path} is damaged: a tensor of shape {list(shape)} reaches beyond its storage")
        return StoredTensor(dtype, shape, (Piece(piece.path, begin, end),) if end > begin else ())


def named_tensors(path: Path, content: Any) -> dict[str, StoredTensor]:
    """The tensors of a state dict.

    Raises:
        UserError: it is none, or a tensor is a view with strides.
    """
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state dict")
    found = {}
    for name, value in content.items():
        if isinstance(value, Inert) and value.args[:1] == ("strides",):
            raise UserError(
                f"{path}: {name} is a view of another tensor (strides {list(value.args[2])} for shape "
                f"{list(value.args[1])}): save the model anew with safetensors"
            )
        if isinstance(value, StoredTensor):
            found[str(name)] = value
    if not found:
        raise UserError(f"{path} holds no tensors")
    return found
