"""Nothing half-written is ever seen: write to a temporary name, flush to disk, rename."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpruner_dist.errors import StageFailure, UserError

TORCH_WRITER = "inline_container"
"""The file of torch that its messages name where torch.save could not write; it swallows the system's own."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission below `path` into a message that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing(path)).free
            raise StageFailure(
                f"no space left while writing {path} ({free / 1e6:.0f} MB free): free some and run the same command "
                "again; what was finished before is kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StageFailure(f"may not write {path}: {error.strerror}; check its owner and its mount") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{path}: a part of that path is a file") from error
        raise
    except RuntimeError as error:
        if TORCH_WRITER not in str(error):
            raise
        free = shutil.disk_usage(_existing(path)).free
        raise StageFailure(
            f"torch could not write {path} ({free / 1e6:.0f} MB free): if the disk is full, free some and run the same "
            "command again; what was finished before is kept"
        ) from error


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuse before the first byte when `num_bytes` do not fit where `folder` is.

    Raises:
        StageFailure: too little space.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if num_bytes > free:
        raise StageFailure(
            f"{folder} needs {num_bytes / 1e6:.0f} MB and {free / 1e6:.0f} MB are free: free some and run the same "
            "command again; nothing was written"
        )


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file, piece by piece, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    write_file(path, [content])


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all. NaN is refused: no reader of ours could trust it."""
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_text(path: Path, content: str) -> None:
    """Write text whole or not at all."""
    write_bytes(path, content.encode())


def commit_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in the place of `final`; the old one goes only after the new one stands.

    Both must lie on one file system. Killed between the two renames, `final` is missing and
    `.NAME.old` still holds the old one: the stage is then not done and is made again.
    """
    with disk_errors(final):
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            else:
                _sync_folder(path)
        _sync_folder(temporary)
        old = final.with_name(f".{final.name}.old")
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        temporary.rename(final)
        _sync_folder(final.parent)
        shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())
