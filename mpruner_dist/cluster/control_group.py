"""The control groups (cgroup v2, or v1) by which Slurm or a container limits the memory of a process."""

from collections.abc import Iterator
from pathlib import Path

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNLIMITED = 2**60
"""cgroup v1 writes the largest number that it knows where there is no limit."""


def memory_limit() -> int | None:
    """Bytes that this process and those beside it may use; None if nothing limits them."""
    return min((limit for limit, _ in _limits()), default=None)


def memory_left() -> int | None:
    """Bytes until the limit; None if nothing limits them."""
    left = [limit - used for limit, used in _limits()]
    return max(min(left), 0) if left else None


def _limits() -> Iterator[tuple[int, int]]:
    """Of this process's group and of those above it that set one: the limit, and what of it is in use, in bytes.

    Pages of files do not count as used, for they are given back before the limit is enforced; shared memory does.
    """
    for line in OWN.read_text().splitlines():
        number, controllers, own = line.split(":", 2)
        if number == "0":
            names = ("memory.max", "memory.current", "file", "shmem")
            yield from _limits_from(GROUPS / own.lstrip("/"), *names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem")
            yield from _limits_from(GROUPS / "memory" / own.lstrip("/"), *names)


def _limits_from(group: Path, limit: str, current: str, of_files: str, shared: str) -> Iterator[tuple[int, int]]:
    for folder in (group, *group.parents):
        text = (folder / limit).read_text().strip() if (folder / limit).is_file() else "max"
        if text != "max" and int(text) < UNLIMITED:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield int(text), int((folder / current).read_text()) - (int(stat[of_files]) - int(stat[shared]))
