"""What `mpruner doctor` has workers do: an all-reduce, and a training step, each with a result that is known."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from mpruner_dist.cluster.engine import gathered, make_engine, start_deepspeed
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.errors import StageFailure

MEGABYTES = 64
REPEATS = 5
LEARNING_RATE = 0.5


def all_reduce_job(worker: Worker, spec: dict[str, Any]) -> None:
    """Sum 64 MB over all workers, check the sum, and write how fast it was to the file `answer`.

    Raises:
        StageFailure: a wrong sum.
    """
    ones = torch.ones(MEGABYTES * 10**6 // 4, device=worker.device)
    expected = worker.world_size * (worker.world_size + 1) / 2
    seconds = []
    for _ in range(REPEATS):
        tensor = ones * (worker.rank + 1)
        worker.barrier()
        begun = time.perf_counter()
        worker.sum_over_workers(tensor)
        low, high = float(tensor.min()), float(tensor.max())  # waits for the device
        seconds.append(time.perf_counter() - begun)
        if (low, high) != (expected, expected):
            raise StageFailure(f"an all-reduce over {worker.world_size} workers gave {low:g} to {high:g}: {expected:g}")
    # what a ring sends over each link, which does not depend on the number of workers
    sent = 2 * (worker.world_size - 1) / worker.world_size * MEGABYTES / 1e3
    _answer(worker, spec["answer"], {"GB/s": sent / min(seconds), "device": str(worker.device.type)})


def train_job(worker: Worker, spec: dict[str, Any]) -> None:
    """One step of a tiny model under ZeRO stage 3, compared with the same step without DeepSpeed.

    Raises:
        StageFailure: weights that did not move, or to other values than they must.
    """
    start_deepspeed(worker.device)
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
        "zero_allow_untested_optimizer": True,
    }
    model, reference = _model(worker.device), _model(worker.device)
    before = [weight.detach().clone() for weight in reference.parameters()]
    torch.manual_seed(1)
    batch, target = torch.randn(2, worker.world_size * 4, 32).to(worker.device)
    engine = make_engine(model, settings, model.parameters())
    own = slice(worker.rank * 4, worker.rank * 4 + 4)
    loss = torch.nn.functional.mse_loss(engine(batch[own]), target[own])
    engine.backward(loss)
    engine.step()
    # all workers' sequences at once, by torch alone
    optimizer = torch.optim.SGD(reference.parameters(), lr=LEARNING_RATE)
    torch.nn.functional.mse_loss(reference(batch), target).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    moved, error = 0.0, 0.0
    for weight, old, expected in zip(engine.module.parameters(), before, reference.parameters(), strict=True):
        with gathered(weight):
            moved += float((weight - old).abs().max())
            error = max(error, float((weight - expected).abs().max()))
    if not (moved > 0 and error < 1e-3 * moved):
        raise StageFailure(
            f"a step under ZeRO stage 3 moved the weights by {moved:.1e}, and they are {error:.1e} off what torch "
            "alone gives"
        )
    worker.barrier()
    _answer(worker, spec["answer"], {"moved": moved, "error": error})


def _model(device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32)).to(device)


def _answer(worker: Worker, folder: Path, facts: dict[str, Any]) -> None:
    """Every worker says what it found, and where it ran."""
    (folder / f"rank{worker.rank}.json").write_text(json.dumps(facts | {"host": worker.host}))
