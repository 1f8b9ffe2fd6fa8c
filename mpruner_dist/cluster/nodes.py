"""The nodes of the Ray cluster that this process has joined."""

from dataclasses import dataclass, field

import ray

Resources = dict[str, float]


@dataclass(frozen=True)
class Node:
    """A living node, and all that it has, free or not."""

    id: str
    host: str
    address: str
    has: Resources = field(compare=False)

    def __str__(self) -> str:
        return f"{self.host} (node {self.id[:8]})"

    def holds(self, each: Resources) -> int:
        """How many workers it holds when nobody else uses it."""
        return min(int(self.has.get(name, 0) // amount) for name, amount in each.items())


def living_nodes() -> list[Node]:
    """All of them that are to stay, by host; nothing can be started any more on one that is drained."""
    leaving = ray._private.state.state.get_draining_nodes()  # ray.nodes() counts them, as Ray Train knows too
    found = (
        Node(node["NodeID"], node["NodeManagerHostname"], node["NodeManagerAddress"], node["Resources"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    )
    return sorted(found, key=str)


def working_nodes() -> list[Node]:
    """Those that work can run on; a head without CPUs gets none."""
    return [node for node in living_nodes() if node.has.get("CPU", 0) > 0]


def elsewhere(nodes: list[Node]) -> bool:
    """Whether one of them is not the node of this process, as where a head without CPUs drives a single worker node."""
    here = ray.get_runtime_context().get_node_id()
    return any(node.id != here for node in nodes)
