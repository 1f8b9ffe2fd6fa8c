"""What a process has of memory for itself."""

from pathlib import Path


def own_memory(pid: int | str = "self") -> int:
    """Bytes of RssAnon; 0 of a process that has just ended.

    Raises:
        OSError: there is none of this number any more.
    """
    words = Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2].split()
    return int(words[0]) * 1024 if words else 0
