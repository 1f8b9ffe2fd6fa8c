"""One worker of a job: its rank, its device, its collectives, its log. Runs inside a Ray Train actor."""

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed

from mpruner_dist.cluster.preemption import SignalWatch
from mpruner_dist.errors import Preempted
from mpruner_dist.logs import ProgressWriter

Job = Callable[["Worker", dict[str, Any]], None]
Item = TypeVar("Item")


def barrier(device: torch.device) -> None:
    """Wait until every worker is here. nccl must be told its GPU: it would take the rank's number for the GPU's."""
    torch.distributed.barrier(device_ids=[device.index] if device.type == "cuda" else None)


class Worker:
    """What a job knows of the place where it runs."""

    def __init__(
        self, rank: int, world_size: int, local_rank: int, local_workers: int, device_kind: str, logs: Path, stage: str,
        node: str = "",
    ) -> None:  # fmt: skip
        self.rank, self.world_size, self.local_workers = rank, world_size, local_workers
        self.logs, self.stage = logs, stage
        self.host = platform.node()
        self.device = torch.device(device_kind, local_rank) if device_kind == "cuda" else torch.device("cpu")
        self._progress: ProgressWriter | None = None
        self._facts: dict[str, Any] = {"host": self.host, "node": node}
        self._signals = SignalWatch()

    @property
    def is_first(self) -> bool:
        """Whether this worker writes what all of them share."""
        return self.rank == 0

    def sum_over_workers(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce a tensor in place, by sum, and return it. gloo and nccl both take float64."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def least_over_workers(self, *numbers: int) -> list[int]:
        """The smallest that any worker has of each."""
        least = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        return [int(number) for number in least]

    def from_first(self, *numbers: int) -> list[int]:
        """What the first worker says; all call it, and what the others say is not heard."""
        unheard = [torch.iinfo(torch.int64).max] * len(numbers)
        return self.least_over_workers(*(numbers if self.is_first else unheard))

    def select_on_first(self, items: Iterable[Item], is_wanted: Callable[[Item], bool]) -> list[Item]:
        """The items that the first worker wants; all call it, with as many items.

        For what shared storage shows: for a while it may show something else to the others, and workers that disagree
        on what is left to do wait for each other for ever.
        """
        items = list(items)
        if not items:
            return []
        wanted = self.from_first(*(int(self.is_first and is_wanted(item)) for item in items))
        return [item for item, is_one in zip(items, wanted, strict=True) if is_one]

    def must_stop(self) -> bool:
        """Whether a signal told one of the workers, or the process that drives them, to stop: all hear the same.

        All must call it equally often, between two steps. It costs an all-reduce of one number.
        """
        name = self._signals.received()
        if name and end_of_group(self.logs, self.stage).exists():
            name = None  # Ray ends the workers that outlive a partner, by SIGTERM too
        if name and "got" not in self._facts:
            self.log(f"got {name}")
            self._note(got=name)
        asked = self.is_first and stop_request(self.logs, self.stage).exists()
        return self.least_over_workers(-int(bool(name) or asked)) == [-1]

    def stop(self, saved: str) -> NoReturn:
        """End the job on all workers together, after `must_stop`, each having saved what it has.

        Raises:
            Preempted: always; it tells what was saved.
        """
        self._note(stopped=saved)
        self.barrier()  # Ray ends all workers once one has raised: everyone has saved and left word
        raise Preempted(saved)

    def barrier(self) -> None:
        """Wait until every worker is here."""
        if self.world_size > 1:
            barrier(self.device)

    def begin_progress(self, label: str, unit: str, total: int, done: int = 0) -> None:
        """Announce work of `total` units, over all workers."""
        self._progress = (
            ProgressWriter(self.logs / "progress.json", label, unit, total, done) if self.is_first else None
        )

    def tell(self, done: int, note: str = "") -> None:
        """Say how far the announced work is."""
        if self._progress is not None:
            self._progress.tell(done, note)

    def doing(self, what: str) -> None:
        """Leave word of what this worker is at, for the message if it is killed."""
        self._note(doing=what)

    def say(self, message: str) -> None:
        """Write to this worker's log what the user shall be told once; the first worker's words reach the driver."""
        self.log(message)
        if self.is_first:
            with said(self.logs, self.stage).open("a") as file:
                file.write(f"{message}\n")

    def log(self, message: str) -> None:
        """Write a line to this worker's log."""
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} rank {self.rank} on {self.host}: {message}\n")

    def run(self, job: Job, spec: dict[str, Any]) -> None:
        """Do the job with this process's output in the worker's log; leave a note beside it if the job fails.

        Raises:
            Preempted: a signal came, and the job stopped for it, or ended before it looked again.
        """
        with (self.logs / f"{self.stage}-rank{self.rank}.log").open("a") as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
        self.log(f"{job.__module__}.{job.__name__} on {self.device}, {torch.get_num_threads()} threads")
        self._note()
        try:
            with self._signals:
                job(self, spec)
                if self.must_stop():  # a signal that came after the job's last look, as in an export
                    self.stop("its work is done")
        except BaseException as error:
            with suppress(OSError):  # a full disk, which may be what the error tells
                traceback.print_exc()
            with suppress(OSError):
                self._note(raised=type(error).__name__, when=time.time())
            raise
        worker_note(self.logs, self.stage, self.rank).unlink()

    def _note(self, **facts: Any) -> None:
        """Add to the note; what was there stays."""
        self._facts |= facts
        note = worker_note(self.logs, self.stage, self.rank)
        temporary = note.with_suffix(".partial")  # a worker may be killed here too
        temporary.write_text(json.dumps(self._facts))
        temporary.replace(note)


def said(logs: Path, stage: str) -> Path:
    """Where the first worker of a stage leaves what the driver shall print."""
    return logs / f".{stage}-said.txt"


def stop_request(logs: Path, stage: str) -> Path:
    """The file by which the driver asks the workers of a stage to stop; the first worker looks for it."""
    return logs / f".{stage}-stop"


def worker_note(logs: Path, stage: str, rank: int) -> Path:
    """Where a worker says on which host it runs, what it is at and what it raised. A killed worker's raised nothing."""
    return logs / f".{stage}-rank{rank}.json"


def end_of_group(logs: Path, stage: str) -> Path:
    """The file that is there once Ray Train has seen a worker of a stage fail, and before it ends the others."""
    return logs / f".{stage}-ending"
