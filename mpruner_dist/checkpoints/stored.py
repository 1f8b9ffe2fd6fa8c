"""Tensors as stretches of bytes in files: what every kind of checkpoint comes down to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpruner_dist.checkpoints.folder import CheckpointFolder, fingerprint


@dataclass(frozen=True)
class Piece:
    """Bytes [begin, end) of a file."""

    path: Path
    begin: int
    end: int


@dataclass(frozen=True)
class StoredTensor:
    """One tensor, row-major: its pieces one after another. `dtype` is named as in safetensors."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.end - piece.begin for piece in self.pieces)


@dataclass(frozen=True)
class StoredCheckpoint:
    """The weights of a model, wherever their bytes lie."""

    path: Path
    companions: Path
    """Folder with config.json, tokenizer and the like."""
    config: dict[str, Any]
    files: dict[str, dict[str, StoredTensor]]
    """Tensors by name, as they lie together; each in the order of its bytes."""
    metadata: dict[str, str]
    """For the headers of new files."""
    keep_split: bool = True
    """Whether the new files shall hold what these hold together; else they are filled up to a size."""

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors by name."""
        return {name: tensor for tensors in self.files.values() for name, tensor in tensors.items()}

    def fingerprint(self) -> str:
        """Digest of what the model computes, see `folder.fingerprint`."""
        middles: dict[Path, set[int]] = {}
        for tensor in self.tensors.values():
            for piece in tensor.pieces:
                middles.setdefault(piece.path, set()).add((piece.begin + piece.end) // 2)
        names = {name: sorted(tensors) for name, tensors in self.files.items()}
        return fingerprint(self.companions, self.config, names, middles)


def stored_safetensors(checkpoint: CheckpointFolder) -> StoredCheckpoint:
    """A folder of safetensors files."""
    files = {
        shard: {
            name: StoredTensor(info.dtype, info.shape, (Piece(checkpoint.path / shard, info.begin, info.end),))
            for name, info in header.tensors.items()
        }
        for shard, header in checkpoint.shards.items()
    }
    metadata = next((header.metadata for header in checkpoint.shards.values()), {})
    return StoredCheckpoint(checkpoint.path, checkpoint.path, checkpoint.config, files, metadata)
