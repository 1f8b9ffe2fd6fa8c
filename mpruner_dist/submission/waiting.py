"""Wait until Ray runs on all nodes: `python -m mpruner_dist.submission.waiting ADDRESS NODE,NODE SECONDS`.

A process of its own, since Ray takes over the signals of the process that joins it.
"""

import logging
import sys
import time

from mpruner_dist.logs import set_up_logging

log = logging.getLogger("mpruner_dist.submission")  # __name__ is __main__ here


def missing_nodes(address: str, names: set[str], seconds: float) -> set[str]:
    """Names of nodes that are not alive in the Ray cluster after at most so many seconds; empty as soon as all are."""
    import ray

    end = time.monotonic() + seconds
    missing = names
    while time.monotonic() < end:
        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            missing = names - {node["NodeName"] for node in ray.nodes() if node["Alive"]}
        except (ConnectionError, RuntimeError, ValueError, TimeoutError):
            missing = names  # the head does not answer yet
        if not missing:
            break
        time.sleep(1)
    return missing


def main() -> None:
    """Exit with 1, and the names, if nodes are missing."""
    set_up_logging()
    address, names, seconds = sys.argv[1:]
    missing = missing_nodes(address, set(names.split(",")), float(seconds))
    if missing:
        log.error("within %s s these nodes did not join Ray at %s: %s", seconds, address, ", ".join(sorted(missing)))
        sys.exit(1)


if __name__ == "__main__":
    main()
