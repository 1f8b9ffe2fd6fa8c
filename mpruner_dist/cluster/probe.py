"""Asks every node of a Ray cluster to look at the shared folders, before anything long starts there."""

import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mpruner_dist.cluster import look
from mpruner_dist.cluster.nodes import Node
from mpruner_dist.errors import StageFailure

log = logging.getLogger(__name__)

DEADLINE_S = 120.0
"""A node that says nothing for so long hangs: starting Python from cold storage takes less."""

ray.cloudpickle.register_pickle_by_value(look)  # a node may not have this package, and shall be able to say so


def on_each(
    nodes: Iterable[Node], function: Callable[..., Any], arguments: Callable[[Node], tuple[Any, ...]], deadline: float
) -> tuple[dict[Node, Any], dict[Node, str]]:
    """Call a function of `look` on each node: what each said, and what is wrong with those that said nothing."""
    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    asked: dict[Any, Node] = {}
    for node in nodes:
        there = remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
        asked[there.remote(*arguments(node))] = node
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=deadline)
    said: dict[Node, Any] = {}
    wrong: dict[Node, str] = {
        node: f"did not answer within {deadline:g} s: a file system that hangs, or no Python that starts"
        for reference, node in asked.items()
        if reference not in ready
    }
    for reference in ready:
        try:
            said[asked[reference]] = ray.get(reference)
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            wrong[asked[reference]] = f"could not be asked: {lines[-1]}"
    return said, wrong


def require_same_view(nodes: list[Node], shared: Path, folders: list[Path], deadline: float = DEADLINE_S) -> None:
    """Have every node read and write in the shared folder, read the other folders, and tell its versions.

    Args:
        nodes: to ask.
        shared: of the run: each node writes a small file there and reads one that this process wrote.
        folders: with models: only read, for they may be read-only.
        deadline: seconds after which a node that has not answered is given up.

    Raises:
        StageFailure: nodes that see something else than this process, each with all that it saw.
    """
    word = secrets.token_hex(8)
    place = shared / f".probe-{word}"
    try:
        place.mkdir()
        (place / "driver").write_text(word)
    except OSError as error:
        raise StageFailure(f"cannot write to {shared}: {error.strerror}") from error
    try:
        said, wrong = on_each(nodes, look.look, lambda node: (place, word, node.id, folders), deadline)
        faults = {node: [problem] for node, problem in wrong.items()}
        here = {"contents": {str(folder): look.contents(folder) for folder in folders}, "versions": look.versions()}
        for node, seen in said.items():
            unseen = None if seen["exchange"] else _unseen(place / node.id, f"{word} {node.id}")
            faults[node] = [*filter(None, [seen["exchange"], unseen]), *_differences(here, seen)]
    finally:
        shutil.rmtree(place, ignore_errors=True)  # a node that still hangs will find no folder to write to
    faults = {node: problems for node, problems in faults.items() if problems}
    if faults:
        lines = [f"  {node}: {'; '.join(faults[node])}" for node in sorted(faults, key=str)]
        raise StageFailure(
            f"{len(faults)} of {len(nodes)} nodes cannot take part in this run:\n" + "\n".join(lines) + "\n"
            "The run folder and the model must lie on storage that all nodes mount under the same path, and the same "
            f"packages be installed on all of them. To try again: mpruner doctor --run-dir {shared}, with "
            "--address ADDRESS where cluster.address names the cluster"
        )
    log.info("%d nodes see the same folders and packages", len(nodes))


def _unseen(file: Path, content: str) -> str | None:
    """What is wrong with the file that a node says it wrote."""
    until = time.monotonic() + look.PATIENCE_S
    while True:
        try:
            if file.read_text() == content:
                return None
        except OSError:
            pass  # not seen yet
        if time.monotonic() > until:
            return f"what it wrote to {file.parent.parent} does not arrive here: other storage, or stale"
        time.sleep(0.1)


def _differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    found = []
    for folder, own in here["contents"].items():
        seen = there["contents"][folder]
        if "wrong" in seen:
            found.append(seen["wrong"])
        elif own != seen:
            found.append(f"{folder} holds something else there: {_first_difference(own, seen)}")
    for name, own in here["versions"].items():
        seen = there["versions"][name]
        if seen is None and own is not None:
            found.append(f"{name} is not installed there")
        elif own != seen:
            found.append(f"{name} is {seen} there, {own} here")
    return found


def _first_difference(own: dict[str, Any], seen: dict[str, Any]) -> str:
    if "wrong" in own:
        return f"here, {own['wrong'].removesuffix(' there')}"
    for name in sorted(own["sizes"].keys() | seen["sizes"].keys()):
        sizes = [part["sizes"].get(name) for part in (seen, own)]
        if sizes[0] != sizes[1]:
            told = ["nothing" if size is None else f"{size:,} bytes" for size in sizes]
            return f"{name}: {told[0]} there, {told[1]} here"
    return "config.json has other bytes"
