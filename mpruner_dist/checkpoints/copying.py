"""Bytes from file to file without passing through Python."""

import errno
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from mpruner_dist.checkpoints.header import TensorInfo, build_header
from mpruner_dist.checkpoints.stored import Piece, StoredTensor
from mpruner_dist.errors import UserError
from mpruner_dist.runs.commit import disk_errors

CHUNK_BYTES = 256 << 10  # a larger buffer is slower: it falls out of the processor's cache
_NOT_HERE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


def copy_tensors(target: Path, tensors: list[tuple[str, StoredTensor]], metadata: dict[str, str]) -> None:
    """Write the safetensors file `target` with these tensors under these names, in this order.

    Memory does not grow with the tensors: the kernel moves the bytes.

    Raises:
        UserError: a source ends early.
        StageFailure: the disk is full or may not be written.
    """
    header = build_header([TensorInfo(name, t.dtype, t.shape, 0, t.num_bytes) for name, t in tensors], metadata)
    with disk_errors(target), ExitStack() as stack, target.open("wb") as writer:
        writer.write(header)
        writer.flush()
        reader: BinaryIO | None = None
        for piece in _joined(piece for _, tensor in tensors for piece in tensor.pieces):
            if reader is None or reader.name != str(piece.path):
                stack.pop_all().close()
                reader = stack.enter_context(piece.path.open("rb"))
            _copy(reader.fileno(), writer.fileno(), piece)
        os.fsync(writer.fileno())  # now, while other files are still being copied


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Join neighbours, so that a stretch of kept tensors is one request."""
    runs: list[Piece] = []
    for piece in pieces:
        if runs and runs[-1].path == piece.path and runs[-1].end == piece.begin:
            runs[-1] = Piece(piece.path, runs[-1].begin, piece.end)
        else:
            runs.append(piece)
    return runs


def _copy(reader: int, writer: int, piece: Piece) -> None:
    """By the best way that these two file systems know: `copy_file_range`, `sendfile`, reading and writing."""
    position, ways = piece.begin, [_in_kernel, _send, _read_and_write]
    while position < piece.end:
        try:
            copied = ways[0](reader, writer, position, piece.end - position)
        except OSError as error:
            if error.errno not in _NOT_HERE or len(ways) == 1:
                raise
            ways.pop(0)
            continue
        if copied == 0 and len(ways) > 1:  # the end of the file, or a kernel that copies nothing and says no error
            ways.pop(0)
            continue
        if copied == 0:
            raise UserError(
                f"{piece.path} ends at byte {position}, {piece.end} expected: it is truncated; fetch it again"
            )
        position += copied


def _in_kernel(reader: int, writer: int, position: int, count: int) -> int:
    return os.copy_file_range(reader, writer, count, offset_src=position)


def _send(reader: int, writer: int, position: int, count: int) -> int:
    return os.sendfile(writer, reader, position, count)


def _read_and_write(reader: int, writer: int, position: int, count: int) -> int:
    content = os.pread(reader, min(CHUNK_BYTES, count), position)
    view = memoryview(content)
    while view:
        view = view[os.write(writer, view) :]
    return len(content)
