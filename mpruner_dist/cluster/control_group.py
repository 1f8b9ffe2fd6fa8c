"""The control groups (cgroup v2) by which Slurm or a container limits the memory of a process."""

from collections.abc import Iterator
from pathlib import Path


def memory_limit() -> int | None:
    """Bytes that this process and those beside it may use; None if nothing limits them."""
    return min((int((folder / "memory.max").read_text()) for folder in _limited()), default=None)


def memory_left() -> int | None:
    """Bytes until the limit; None if nothing limits them."""
    left = [int((folder / "memory.max").read_text()) - _used(folder) for folder in _limited()]
    return max(min(left), 0) if left else None


def _limited() -> Iterator[Path]:
    """The folders of this process's group and those above it that set a limit."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    group = Path("/sys/fs/cgroup") / own.lstrip("/")
    for folder in (group, *group.parents):
        limit = folder / "memory.max"
        if limit.is_file() and limit.read_text().strip() != "max":
            yield folder


def _used(folder: Path) -> int:
    """Bytes in use, without pages of files, which are given back before the limit is enforced; shared memory is not."""
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int((folder / "memory.current").read_text()) - (int(stat["file"]) - int(stat["shmem"]))
