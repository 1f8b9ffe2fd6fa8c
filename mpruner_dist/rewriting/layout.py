"""Which tensors of a checkpoint stay, under which names, in which new files."""

import re
from dataclasses import dataclass
from pathlib import Path

from mpruner_dist.checkpoints.copying import copy_tensors
from mpruner_dist.checkpoints.folder import shard_name
from mpruner_dist.checkpoints.header import TensorInfo, build_header
from mpruner_dist.checkpoints.naming import layer_of
from mpruner_dist.checkpoints.stored import StoredCheckpoint, StoredTensor
from mpruner_dist.errors import UserError

NEXT_TOKEN = re.compile(r"(^|\.)mtp(\.|_)")
"""Tensors for predicting further tokens, where they do not follow the stack as layers of its own."""
DEFAULT_SHARD_BYTES = 5_000_000_000
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class StackNames:
    """A stack as the checkpoint names it."""

    prefix: str
    depth: int
    kept: list[int]
    first_only: re.Pattern[str]
    """Tensors that only the first block has, for all of them."""
    with_next_token: bool = True
    """Whether layers that follow the stack, for predicting further tokens, stay."""


@dataclass(frozen=True)
class ShardCopy:
    """One new file: which tensors, under which names."""

    target: Path
    tensors: list[tuple[str, StoredTensor]]
    metadata: dict[str, str]

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        infos = [TensorInfo(name, t.dtype, t.shape, 0, t.num_bytes) for name, t in self.tensors]
        return len(build_header(infos, self.metadata)) + sum(info.num_bytes for info in infos)

    @property
    def is_done(self) -> bool:
        """Whether the file stands, whole."""
        return self.target.is_file() and self.target.stat().st_size == self.num_bytes


def new_names(names: list[str], stacks: list[StackNames]) -> dict[str, str]:
    """Old name -> new name of every tensor that stays, in the given order."""
    known = set(names)
    renamed = {name: _new_name(name, known, stacks) for name in names}
    return {old: new for old, new in renamed.items() if new is not None}


def _new_name(name: str, names: set[str], stacks: list[StackNames]) -> str | None:
    for stack in stacks:
        layer = layer_of(name, stack.prefix)
        if layer is None:
            continue
        rest = name.removeprefix(f"{stack.prefix}.{layer}.")
        if layer >= stack.depth:
            following = len(stack.kept) + layer - stack.depth
            return f"{stack.prefix}.{following}.{rest}" if stack.with_next_token else None
        if layer in stack.kept:
            return f"{stack.prefix}.{stack.kept.index(layer)}.{rest}"
        is_first = layer == 0 and stack.first_only.search(rest)
        if is_first and f"{stack.prefix}.{stack.kept[0]}.{rest}" not in names:
            return f"{stack.prefix}.0.{rest}"
        return None
    if NEXT_TOKEN.search(name) and not all(stack.with_next_token for stack in stacks):
        return None
    return name


def plan_copies(
    checkpoint: StoredCheckpoint, renamed: dict[str, str], folder: Path, max_shard_bytes: int | None
) -> list[ShardCopy]:
    """New files for the tensors that stay; they keep the order of their bytes.

    Args:
        checkpoint: where the tensors lie.
        renamed: old name -> new name.
        folder: where the files will lie.
        max_shard_bytes: fill files up to so many bytes; None leaves together what lies together.
    """
    files: list[list[tuple[str, StoredTensor]]] = []
    filled = 0
    limit = max_shard_bytes or (None if checkpoint.keep_split else DEFAULT_SHARD_BYTES)
    for tensors in checkpoint.files.values():
        kept = [(renamed[name], tensor) for name, tensor in tensors.items() if name in renamed]
        if limit is None:
            files.append(kept)
            continue
        for name, tensor in kept:
            if not files or filled + tensor.num_bytes > limit:
                files.append([])
                filled = 0
            files[-1].append((name, tensor))
            filled += tensor.num_bytes
    files = [tensors for tensors in files if tensors]
    return [
        ShardCopy(folder / shard_name(number, len(files)), tensors, checkpoint.metadata)
        for number, tensors in enumerate(files, 1)
    ]


def copy_shard(copy: ShardCopy) -> None:
    """Write one file whole or not at all; one that stands already is left alone."""
    if copy.is_done:
        return
    temporary = copy.target.with_suffix(".tmp")
    try:
        copy_tensors(temporary, copy.tensors, copy.metadata)
        temporary.replace(copy.target)
    finally:
        temporary.unlink(missing_ok=True)


def parse_size(text: str) -> int:
    """Bytes of a text such as `5GB` or `500MiB`.

    Raises:
        UserError: not such a text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"size {text!r}: write a number and a unit, such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
