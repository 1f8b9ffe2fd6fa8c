"""Where the workers go: what each asks of a node, and waiting until the cluster has the place."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util import placement_group, remove_placement_group
from torch.distributed import is_nccl_available

from mpruner_dist.cluster import preemption
from mpruner_dist.cluster.nodes import Node, Resources, living_nodes
from mpruner_dist.config import ClusterConfig
from mpruner_dist.errors import StageFailure

log = logging.getLogger(__name__)

LOOK_S = 3
"""So long a cluster with free resources may take to say that it has reserved them."""
Usable = Callable[[int], bool]


@dataclass(frozen=True)
class Place:
    """How many workers start, on which kind of device, and what each of them has."""

    workers: int
    device: str
    cpus: int

    @property
    def resources(self) -> Resources:
        """What a worker asks of its node."""
        return {"CPU": self.cpus, "GPU": 1} if self.device == "cuda" else {"CPU": self.cpus}


def choose_device(config: ClusterConfig, nodes: list[Node], joined: bool) -> str:
    """`cuda` if `auto` is asked for and as many GPUs are there as workers must be, else `cpu`.

    Args:
        config: how many workers, and the device.
        nodes: what they have, as Ray sees it.
        joined: whether the cluster was there before; if not, torch here is what the workers will have.

    Raises:
        StageFailure: `cuda` is asked for, and torch can use no GPU of this machine.
    """
    gpus = sum(int(node.has.get("GPU", 0)) for node in nodes)
    if config.device != "cpu" and gpus and not joined and not (torch.cuda.is_available() and is_nccl_available()):
        unusable = (
            f"this machine has {gpus} GPU(s) that torch {torch.__version__} cannot use: install a torch for its driver"
        )
        if config.device == "cuda":
            raise StageFailure(f"{unusable}, or set cluster.device cpu")
        log.warning("%s; the workers run on CPUs", unusable)
        return "cpu"
    if config.device != "auto":
        return config.device
    least = config.min_workers or config.workers
    if 0 < gpus < least:
        log.warning(
            "the workers run on CPUs: %d of them need a GPU each, and there are %d. Lower cluster.workers, or set "
            "cluster.device cuda to use or await GPUs alone", least, gpus,
        )  # fmt: skip
    return "cuda" if gpus >= least else "cpu"


def cpus_each(workers: int, device: str, nodes: list[Node], joined: bool) -> int:
    """CPUs of a worker where the configuration does not say: as many as leave room for all.

    On GPUs of a cluster that others may use too, no more than go with a GPU on the node that has fewest for each.
    """
    if device == "cuda" and joined:
        shares = [int(node.has.get("CPU", 0) // node.has["GPU"]) for node in nodes if node.has.get("GPU", 0) >= 1]
        return min((share for share in shares if share), default=1)
    most = max((int(node.has.get("CPU", 0)) for node in nodes), default=1)
    fitting = (cpus for cpus in range(most, 0, -1) if sum(node.holds({"CPU": cpus}) for node in nodes) >= workers)
    return next(fitting, 1)


def find_place(config: ClusterConfig, device: str, *, joined: bool, usable: Usable) -> Place:
    """Wait until the workers can be placed, packed on as few nodes as hold them, each on one node.

    A machine's own Ray is this run's alone: there, nothing is waited for. Nothing stays reserved: should others take
    the place before the workers do, Ray Train fails after a minute.

    Args:
        config: how many workers, how long to wait and how few will do.
        device: of the workers.
        joined: whether the cluster was there before.
        usable: whether the work can be divided among so many workers.

    Raises:
        StageFailure: even `config.min_workers` do not fit.
        Preempted: a signal came while it waited.
    """
    nodes, wanted, free = living_nodes(), config.workers, {}
    place = Place(wanted, device, config.cpus_per_worker or cpus_each(wanted, device, nodes, joined))
    if not joined:
        fit = min(wanted, sum(node.holds(place.resources) for node in nodes))
    elif _can_be_placed(place, config.wait_s):
        fit = wanted
    else:
        free = ray.available_resources()  # before rooms are reserved to count them
        fit = _count_fitting(place)
    least = config.min_workers or wanted
    number = next((number for number in range(fit, least - 1, -1) if number == wanted or usable(number)), None)
    if number is None:
        raise StageFailure(_refusal(config, place, fit, free if joined else None))
    if number < wanted:
        log.warning(
            "only %d of %d workers of %s fit: going on with %d (cluster.min_workers %d)",
            fit, wanted, _words(place.resources), number, least,
        )  # fmt: skip
    return Place(number, device, place.cpus)


def await_room(config: ClusterConfig) -> None:
    """Wait until the cluster has a CPU for a task.

    Raises:
        StageFailure: it has none in time.
        Preempted: a signal came while it waited.
    """
    if not _can_be_placed(Place(1, "cpu", 1), config.wait_s):
        raise StageFailure(
            f"no CPU of the Ray cluster was free within {config.wait_s} s, and each file is a task that asks for one: "
            "raise cluster.wait_s, or come back when other jobs have ended; the same command goes on"
        )


def _can_be_placed(place: Place, wait_s: int) -> bool:
    """Whether the cluster can reserve room for all workers at once within so many seconds."""
    group = placement_group([place.resources] * place.workers, strategy="PACK")
    try:
        deadline = time.monotonic() + wait_s
        ready = [group.ready()]
        placed, _ = ray.wait(ready, timeout=LOOK_S)
        if not placed:
            log.info(
                "waiting at most %d s for room for %d worker(s) of %s on the Ray cluster",
                wait_s, place.workers, _words(place.resources),
            )  # fmt: skip
        while not placed and time.monotonic() < deadline:
            preemption.stop_if_told()
            placed, _ = ray.wait(ready, timeout=1)
        return bool(placed)
    finally:
        remove_placement_group(group)


def _count_fitting(place: Place) -> int:
    """How many of the workers would fit now."""
    groups = [placement_group([place.resources]) for _ in range(place.workers)]
    try:
        placed, _ = ray.wait([group.ready() for group in groups], num_returns=len(groups), timeout=LOOK_S)
        return len(placed)
    finally:
        for group in groups:
            remove_placement_group(group)


def _refusal(config: ClusterConfig, place: Place, fit: int, free: Resources | None) -> str:
    """Why so few workers fit, what every node has, what to do; `free` is what nobody uses of a joined cluster."""
    joined = free is not None
    nodes, each, least = living_nodes(), place.resources, config.min_workers or config.workers
    idle = sum(node.holds(each) for node in nodes)
    where, waited = ("the Ray cluster", f" after {config.wait_s} s") if joined else ("this machine", "")
    if fit >= least:
        why = f"no number from {least} to {fit} divides the work: see retrain.batch_size and retrain.micro_batch_size"
    elif idle >= least:
        why = f"if it were idle, {idle} would fit: others use it"
    else:
        why = f"even if it were idle, only {idle} would fit, each on one node"
    has = "; ".join(f"{node.address} has {_amounts(node.has, each)}" for node in nodes)
    if free is not None:
        has += f"; free in all: {_amounts(free, each)}"
    ways = ["lower cluster.workers or cluster.cpus_per_worker", "add nodes"]
    if place.device == "cuda" and sum(node.holds({"GPU": 1}) for node in nodes) >= least:
        ways.append("give each GPU more CPUs (of Slurm: --cpus-per-gpu)")
    if joined:
        ways += ["raise cluster.wait_s", "allow fewer with cluster.min_workers"]
    return (
        f"{fit} of {place.workers} workers of {_words(each)} fit on {where}{waited}; {why}. {has}. "
        f"{', '.join(ways[:-1]).capitalize()}, or {ways[-1]}"
    )


def _words(each: Resources) -> str:
    return " and ".join(f"{amount:g} {name}{'s' if amount != 1 else ''}" for name, amount in each.items())


def _amounts(amounts: dict[str, Any], names: Resources) -> str:
    return ", ".join(f"{amounts.get(name, 0):g} {name}" for name in names)
