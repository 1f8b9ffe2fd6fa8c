"""What a Ray cluster says of itself, as JSON: run as a process of its own, for a cluster may not answer.

The address comes in RAY_ADDRESS; it is not printed.
"""

import json
import logging
import os
from typing import Any

import ray

from mpruner_dist.cluster.address import require_listener


def cluster_facts(address: str) -> dict[str, Any]:
    """Nodes and resources of a running cluster."""
    require_listener(address)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    alive = [node for node in ray.nodes() if node["Alive"]]
    facts = {
        "nodes": len(alive),
        "resources": _without_addresses(ray.cluster_resources()),
        "free": _without_addresses(ray.available_resources()),
    }
    ray.shutdown()
    return facts


def _without_addresses(resources: dict[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in sorted(resources.items()) if not name.startswith("node:")}


if __name__ == "__main__":
    print(json.dumps(cluster_facts(os.environ["RAY_ADDRESS"])))
