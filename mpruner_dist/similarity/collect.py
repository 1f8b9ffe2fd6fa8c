"""The stage `collect`: HSIC sums of every calibration batch, on all workers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpruner_dist.cluster.engine import start_deepspeed
from mpruner_dist.cluster.settings import inference_settings
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config
from mpruner_dist.data.blocks import batch_rows, load_blocks, share_of_batches
from mpruner_dist.errors import StageFailure
from mpruner_dist.models.blocks import find_blocks, num_layers
from mpruner_dist.models.engines import inference_engine
from mpruner_dist.models.scoring import model_inputs
from mpruner_dist.similarity.samples import LayerTap, draw_candidates
from mpruner_dist.similarity.sums import HsicSums

SUM_TOLERANCE = 1e-12  # all-reduce and fold add the same float64 numbers in another order


def collect_job(worker: Worker, spec: dict[str, Any]) -> None:
    """What every worker does: forward passes over its share of the batches that no earlier attempt has saved.

    spec: config (Config), model (Path), blocks (Path), sums (Path), deepspeed (dict).

    Raises:
        StageFailure: the sums that were all-reduced are not those on disk.
    """
    config: Config = spec["config"]
    blocks, folder = load_blocks(spec["blocks"]), Path(spec["sums"])
    saved = HsicSums.load(folder)
    todo = [batch for batch in range(config.collect.num_batches) if batch not in saved.hsic]
    mine, turns = share_of_batches(todo, worker.rank, worker.world_size)
    worker.barrier()  # nobody saves before everybody has looked
    engine, tap = _prepare(worker, config, spec)
    total_LL = torch.zeros(tap.num_layers, tap.num_layers, dtype=torch.float64)
    if worker.is_first and saved.hsic:
        total_LL += torch.from_numpy(saved.total())
    fresh = HsicSums()
    worker.begin_progress("collect", "batches", config.collect.num_batches, len(saved.hsic))
    for turn in range(turns):
        batch = mine[turn] if turn < len(mine) else todo[0]
        hsic_LL, num_samples = _one_batch(worker, config, engine, tap, blocks, batch)
        if turn < len(mine):
            total_LL += hsic_LL
            fresh.update(batch, hsic_LL.numpy(), num_samples)
        if len(fresh.hsic) >= config.collect.save_every:
            fresh.save(folder)
            fresh = HsicSums()
        worker.tell(min(len(saved.hsic) + (turn + 1) * worker.world_size, config.collect.num_batches))
    if fresh.hsic:
        fresh.save(folder)
    tap.close()
    reduced_LL = worker.sum_over_workers(total_LL.to(worker.device)).cpu().numpy()
    if worker.is_first:  # every worker has saved before it took part in the all-reduce
        _check_sums(reduced_LL, HsicSums.load(folder), config.collect.num_batches)


def _prepare(worker: Worker, config: Config, spec: dict[str, Any]) -> tuple[Any, LayerTap]:
    start_deepspeed(worker.device)
    settings = inference_settings(spec["deepspeed"], config.cluster.zero_stage, config.model.dtype)
    engine = inference_engine(settings, Path(spec["model"]), config.model, head=False)
    _, stack = find_blocks(engine.module, num_layers(engine.module.config))
    return engine, LayerTap(stack, config.collect)


def _one_batch(
    worker: Worker, config: Config, engine: Any, tap: LayerTap, blocks: Any, batch: int
) -> tuple[torch.Tensor, int]:
    rows = blocks.rows(batch_rows(batch, config.collect.batch_size, len(blocks)))
    inputs = model_inputs(rows, worker.device)
    tap.begin(batch, draw_candidates(inputs["attention_mask"].cpu(), config.collect, batch))
    with torch.no_grad():
        engine(**inputs)
    return tap.hsic()


def _check_sums(reduced_LL: Any, saved: HsicSums, num_batches: int) -> None:
    if sorted(saved.hsic) != list(range(num_batches)):
        raise StageFailure(
            f"{len(saved.hsic)} of {num_batches} batches are saved although all workers finished: run again"
        )
    total_LL = saved.total()
    error = float(np.abs(reduced_LL - total_LL).max() / np.abs(total_LL).max())
    if not error <= SUM_TOLERANCE:
        raise StageFailure(
            f"the all-reduced sums differ from the saved ones by {error:.1e} of their size: a worker's disk or network "
            "cannot be trusted"
        )
