"""Why the workers of a stage ended: killed, lost with their node, told to stop, or failed by themselves."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import ControllerError, TrainingFailedError, UserCallback, WorkerGroupError

from mpruner_dist.cluster import preemption
from mpruner_dist.cluster.worker import end_of_group, worker_note
from mpruner_dist.errors import MPrunerError, Preempted, StageFailure, first_line

BATCHES = {"collect": "collect.batch_size", "retrain": "retrain.micro_batch_size, or evaluate.batch_size"}
"""By what the batches of a stage are sized; those of all others by evaluate.batch_size alone."""
NODE_DEATH_S = 60
"""Ray's default settings take less to call a node dead that does not answer."""
Notes = dict[int, dict[str, Any]]


class LeaveWordOfEnd(UserCallback):  # type: ignore[misc]
    """Lets workers tell the SIGTERM by which Ray ends them, once one has failed, from one that announces an end.

    Args:
        logs: where the word is left.
        stage: whose workers they are.
    """

    def __init__(self, logs: Path, stage: str) -> None:
        self._path = end_of_group(logs, stage)
        self._path.unlink(missing_ok=True)

    def after_exception(self, **_: Any) -> None:
        """Leave it: Ray Train calls this before it ends the others."""
        self._path.touch()


def explain(error: TrainingFailedError, stage: str, logs: Path, workers: int, *, joined: bool) -> str:
    """Say which worker was killed; raise what a worker raised itself, for that would only happen again.

    Args:
        error: of Ray Train.
        stage: its name.
        logs: where the workers left word.
        workers: how many there were.
        joined: whether the Ray cluster is not this machine's own, so that nodes can be lost.

    Raises:
        MPrunerError: a worker failed by itself, with its rank and host.
        Preempted: a worker, or this process, was told to stop.
    """
    everyone = _read_notes(logs, stage, range(workers))
    _raise_if_preempted(stage, everyone)
    if not isinstance(error, WorkerGroupError):
        # Ray Train lost a worker before it had heard from all of them, and does not say which.
        were = "".join(f", rank {rank}{_at(note)}" for rank, note in everyone.items() if note)
        cause = error.controller_failure if isinstance(error, ControllerError) else error
        what = "a worker was killed while the workers started" if were else "the workers did not start"
        cause = getattr(cause, "cause", None) or cause  # of Ray's wrapping, the first line names a process only
        return f"{stage}: {what}{were} ({first_line(cause)})"
    failures: dict[int, Exception] = error.worker_failures
    notes = {rank: everyone[rank] for rank in sorted(failures)}
    for rank, note in notes.items():
        # one without room for its note raised all the same
        if "raised" not in note and not isinstance(failures[rank], MPrunerError):
            cause = getattr(failures[rank], "health_check_failure", failures[rank])  # what Ray says of the actor
            return f"{stage}: {_who(rank, note)} was killed{_at(note)} ({first_line(cause)})"
    # the others only lost their partner
    rank = min(notes, key=lambda rank: float(notes[rank].get("when", 0)))
    where, cause = f"{stage}: {_who(rank, notes[rank])} failed{_at(notes[rank])}", failures[rank]
    if isinstance(cause, MPrunerError):
        raise type(cause)(f"{where}: {cause}") from error
    if isinstance(cause, torch.OutOfMemoryError):
        raise StageFailure(
            f"{where}: {first_line(cause)} Lower {BATCHES.get(stage, 'evaluate.batch_size')}, or divide the weights "
            "(ZeRO stage 3)"
        ) from error
    lost = _lost_with_its_node(everyone) if joined and isinstance(cause, RuntimeError) else None
    if lost is not None:
        return f"{stage}: {_who(lost, everyone[lost])} was lost with its node{_at(everyone[lost])}"
    raise StageFailure(
        f"{where}: {notes[rank]['raised']}: {first_line(cause)}; its log: {logs / f'{stage}-rank{rank}.log'}"
    ) from error


def _lost_with_its_node(notes: Notes) -> int | None:
    """A rank whose node is dead, for which Ray may need a while; its partners fail at once, in their collectives."""
    nodes = {note.get("node") for note in notes.values() if note}
    deadline = time.monotonic() + (NODE_DEATH_S if len(nodes) > 1 else 0)
    while True:
        dead = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
        lost = [rank for rank, note in notes.items() if note.get("node") in dead]
        if lost or time.monotonic() >= deadline:
            return lost[0] if lost else None
        time.sleep(1)


def _read_notes(logs: Path, stage: str, ranks: Iterable[int]) -> Notes:
    """What workers left word of; nothing of those that did not begin."""
    paths = {rank: worker_note(logs, stage, rank) for rank in ranks}
    return {rank: json.loads(path.read_text()) if path.exists() else {} for rank, path in paths.items()}


def _raise_if_preempted(stage: str, notes: Notes) -> None:
    """Workers that were told to stop are not started again, not even if one was killed before it could save."""
    who = [f"rank {rank} on {note['host']} got {note['got']}" for rank, note in notes.items() if "got" in note]
    if preemption.told():
        who.insert(0, f"mpruner got {preemption.told()}")
    saved = [note["stopped"] for note in notes.values() if "stopped" in note]
    if saved or who:
        what = saved[0] if saved else "a worker was killed before all was saved"
        raise Preempted(f"{stage}: {' and '.join(who)}; {what}; the same command goes on")


def _who(rank: int, note: dict[str, Any]) -> str:
    return f"rank {rank} on {note.get('host', 'a host that it had not told yet')}"


def _at(note: dict[str, Any]) -> str:
    return f" at {note['doing']}" if "doing" in note else ""
