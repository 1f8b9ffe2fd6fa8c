"""Bytes from file to file without passing through Python."""

import errno
import os
from pathlib import Path

from mpruner_dist.checkpoints.header import TensorInfo, build_header
from mpruner_dist.errors import UserError
from mpruner_dist.runs.commit import disk_errors

CHUNK_BYTES = 16 << 20
_NOT_HERE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF}


def copy_tensors(source: Path, target: Path, tensors: list[tuple[TensorInfo, str]], metadata: dict[str, str]) -> None:
    """Write `target` with these tensors of `source` under their new names, in this order.

    Memory does not grow with the tensors: the kernel moves the bytes.

    Raises:
        UserError: the source ends early.
        StageFailure: the disk is full or may not be written.
    """
    header = build_header(
        [TensorInfo(name, info.dtype, info.shape, info.begin, info.end) for info, name in tensors], metadata
    )
    with disk_errors(target), source.open("rb") as reader, target.open("wb") as writer:
        writer.write(header)
        writer.flush()
        for begin, end in _runs([info for info, _ in tensors]):
            _copy_range(reader.fileno(), writer.fileno(), begin, end, source)


def _runs(tensors: list[TensorInfo]) -> list[tuple[int, int]]:
    """Join neighbours, so that a stretch of kept tensors is one request."""
    runs: list[tuple[int, int]] = []
    for info in tensors:
        if runs and runs[-1][1] == info.begin:
            runs[-1] = (runs[-1][0], info.end)
        else:
            runs.append((info.begin, info.end))
    return runs


def _copy_range(reader: int, writer: int, position: int, end: int, source: Path) -> None:
    in_kernel = True
    while position < end:
        if in_kernel:
            try:
                copied = os.copy_file_range(reader, writer, end - position, offset_src=position)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                in_kernel = False  # this file system or pair of them cannot; read and write below
                continue
        else:
            copied = _write_all(writer, os.pread(reader, min(CHUNK_BYTES, end - position), position))
        if copied == 0:
            raise UserError(f"{source} ends at byte {position}, {end} expected: it is truncated; fetch it again")
        position += copied


def _write_all(writer: int, content: bytes) -> int:
    view = memoryview(content)
    while view:
        view = view[os.write(writer, view) :]
    return len(content)
