"""How well a model does its task: summed over all predictions on all workers, then divided once."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpruner_dist.cluster.worker import Worker
from mpruner_dist.data.blocks import batch_rows, num_batches, turns_of
from mpruner_dist.data.parts import Part
from mpruner_dist.errors import Fruitless
from mpruner_dist.tasks import Batch, Task


@dataclass(frozen=True)
class Score:
    """What a model scores on a part of the data."""

    loss: float
    """Negative log-likelihood, nats a prediction."""
    quality: dict[str, float]
    """By the task's metrics."""
    predictions: int
    seconds: float
    """Of the slowest worker."""


def score_part(
    worker: Worker,
    engine: Any,
    task: Task[Any],
    part: Part,
    batch_size: int,
    tell: Callable[[int], None] = lambda _: None,
) -> Score:
    """Score a part on all workers; the same on every worker. `tell` hears how many batches are done.

    Raises:
        Fruitless: the likelihood is not finite.
    """
    batches = num_batches(len(part), batch_size)
    # A warm-up, outside the time: on a GPU kernels are loaded, and memory reserved, for a batch's own shape
    first = batch_rows(0, batch_size, len(part)) if worker.device.type == "cuda" else [0]
    sums = torch.zeros_like(task.tally(*forward(worker, engine, task, part.rows(first))))
    if worker.device.type == "cuda":  # it has only been told to; a barrier waits for it where there are others
        torch.cuda.synchronize(worker.device)
    worker.barrier()
    begun = time.monotonic()
    for turn, (batch, counts) in enumerate(turns_of(range(batches), worker.rank, worker.world_size)):
        rows = part.rows(batch_rows(batch, batch_size, len(part)))
        tally = task.tally(*forward(worker, engine, task, rows))
        if counts:
            sums += tally
        tell(min((turn + 1) * worker.world_size, batches))
    worker.barrier()
    seconds = time.monotonic() - begun
    total = worker.sum_over_workers(sums).tolist()
    nll, predictions = total[:2]
    if not nll < float("inf"):
        raise Fruitless("the model's loss is not finite: try model.dtype float32 or bfloat16")
    return Score(nll / predictions, task.quality(total), int(predictions), seconds)


def forward(worker: Worker, engine: Any, task: Task[Any], part: Part) -> tuple[Tensor, Batch]:
    """Logits of these sequences or images, on this worker, and the batch that they follow from."""
    batch = task.batch(part, worker.device)
    with torch.no_grad():
        return engine(**batch.inputs).logits, batch
