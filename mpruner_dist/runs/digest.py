"""Short names for content: equal digests mean equal inputs."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WHOLE_BYTES = 2**30


def digest(content: Any) -> str:
    """Digest of JSON-like data, independent of the order of keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def content_digest(path: Path) -> str:
    """Digest of a file of data: of all its bytes, but where there are more than `WHOLE_BYTES`, of spots."""
    return file_digest(path) if path.stat().st_size <= WHOLE_BYTES else spot_digest(path)


def spot_digest(path: Path, places: Iterable[int] = ()) -> str:
    """Digest of a file's size, of sixteen spots of 64 KiB and of 4 KiB at each place: quick for files of any size."""
    size = path.stat().st_size
    state = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for spot in range(16):
            file.seek(size * spot // 16)
            state.update(file.read(65536))
        for place in sorted(places):
            file.seek(place)
            state.update(file.read(4096))
    return state.hexdigest()[:16]
