"""The stage `collect`: the terms of every calibration batch, on all workers."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpruner_dist.cluster.engine import start_deepspeed
from mpruner_dist.cluster.settings import zero_stage
from mpruner_dist.cluster.shape import GATHERED_PARAMETERS, ROOM, free_memory
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import CollectConfig, Config
from mpruner_dist.data.blocks import batch_rows, turns_of
from mpruner_dist.data.parts import Part, load_part
from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.models.blocks import activations_per_token
from mpruner_dist.models.engines import forward_settings, inference_engine
from mpruner_dist.models.stacks import series_of_blocks
from mpruner_dist.similarity.hsic import AT_ONCE
from mpruner_dist.similarity.samples import Samples, draw_samples
from mpruner_dist.similarity.sums import BatchSums, Terms, join_series
from mpruner_dist.similarity.tap import BatchStatistics, LayerTap
from mpruner_dist.tasks import task_of

SUM_TOLERANCE = 1e-12  # all-reduce and fold add the same float64 numbers in another order
OF_MASKS = (" of what is read", " of its targets")
IsSettled = Callable[[BatchSums], bool]


def collect_job(worker: Worker, spec: dict[str, Any]) -> None:
    """What every worker does: forward passes over its share of the batches that no earlier attempt has saved.

    spec: config (Config), model (Path), blocks (Path), sums (Path), deepspeed (dict), is_settled (IsSettled or None).

    Raises:
        StageFailure: the sums that were all-reduced are not those on disk.
        Preempted: a signal came, and the sums are saved.
    """
    config: Config = spec["config"]
    saved = BatchSums.load(Path(spec["sums"])) if worker.is_first else BatchSums()
    collection = Collection(worker, config, spec, saved)
    for end in ends_of_windows(config.collect):
        collection.go_on_to(end)
        if spec["is_settled"] is not None and collection.is_settled(spec["is_settled"]):
            break
    collection.finish()


def ends_of_windows(config: CollectConfig) -> list[int]:
    """Numbers of batches after which the workers look whether more are needed: fixed by the configuration alone."""
    if config.until == "all":
        return [config.num_batches]
    return [*range(config.check_every, config.num_batches, config.check_every), config.num_batches]


class Collection:
    """One worker's part of the work."""

    def __init__(self, worker: Worker, config: Config, spec: dict[str, Any], saved: BatchSums) -> None:
        """`saved`: by earlier attempts, as the first worker sees it; empty on the others."""
        self.worker, self.config, self.folder, self.saved = worker, config, Path(spec["sums"]), saved
        self.fresh, self.mine = BatchSums(), BatchSums()
        self.end = 0
        start_deepspeed(worker.device)
        settings = forward_settings(worker, spec["deepspeed"], config, Path(spec["model"]))
        self.task = task_of(config.model)
        self.part: Part = load_part(spec["blocks"])
        # a head over classes is small, and that of an encoder-decoder makes the decoder's input
        head = self.task.facts.unit != "token"
        self.engine = inference_engine(settings, Path(spec["model"]), config.model, worker.log, head=head)
        series = series_of_blocks(self.engine.module)
        self.taps = [LayerTap(blocks, sum(map(len, series[:number]))) for number, blocks in enumerate(series)]
        self.at_once = self._batches_at_once(series[-1][0], zero_stage(settings))
        worker.begin_progress("collect", "batches", config.collect.num_batches, len(saved))

    def go_on_to(self, end: int) -> None:
        """Do this worker's share of the batches below `end` that nobody has saved, and save it."""
        worker = self.worker
        todo = worker.select_on_first(range(self.end, end), lambda batch: batch not in self.saved.terms)
        turns = list(turns_of(todo, worker.rank, worker.world_size))
        for turn in range(0, len(turns), self.at_once):
            group = [batch for batch, counts in turns[turn : turn + self.at_once] if counts]
            if group:
                self.fresh.merge(self._forward(group))
            else:  # a turn taken, and not counted, only because ZeRO stage 3 needs everyone
                self._forward(todo[:1])
            if len(self.fresh) >= self.config.collect.save_every:
                self._save()
            worker.tell(min(end - len(todo) + (turn + self.at_once) * worker.world_size, end))
            if worker.must_stop():
                self._save()
                worker.stop("the sums of all batches that were done are saved")
        self._save()
        self.end = end
        worker.barrier()  # everyone has saved

    def is_settled(self, is_settled: IsSettled) -> bool:
        """Whether no more batches are needed: the first worker judges by those up to here, and tells the others.

        An attempt that was stopped may have saved more of them.
        """
        yes = self.worker.is_first and is_settled(BatchSums.load(self.folder).before(self.end))
        return self.worker.sum_over_workers(torch.tensor([float(yes)], device=self.worker.device)).item() > 0

    def finish(self) -> None:
        """All-reduce the terms and compare them with the saved ones.

        Raises:
            StageFailure: they differ, or a batch is missing.
        """
        for tap in self.taps:
            tap.close()
        if self.worker.is_first:  # it speaks for earlier attempts
            self.mine.merge(self.saved)
        on_disk = BatchSums.load(self.folder)
        if sorted(on_disk.terms) != list(range(self.end)):
            raise StageFailure(
                f"{len(on_disk)} of {self.end} batches are saved although all workers finished: run again"
            )
        total = on_disk.total()
        mine = self.mine.total() or {name: np.zeros_like(value) for name, value in total.items()}
        flat = torch.cat([torch.from_numpy(mine[name].reshape(-1)) for name in total])
        reduced = self.worker.sum_over_workers(flat.to(self.worker.device)).cpu().numpy()
        _check_sums(reduced, total)

    def _forward(self, batches: list[int]) -> BatchSums:
        """One forward pass over the sequences of these batches, one batch after another."""
        self.worker.doing(f"batch {', '.join(map(str, batches))}")
        group, samples = grouped(self.part, batches, self.config.collect)
        statistics = [
            [
                BatchStatistics(batch, drawn.to(self.worker.device), self.config.collect, tap.layers, tap.first)
                for batch, drawn in zip(batches, of_series, strict=True)
            ]
            for tap, of_series in zip(self.taps, for_series(samples, len(self.taps)), strict=True)
        ]
        for tap, of_series in zip(self.taps, statistics, strict=True):
            tap.begin(of_series)
        with torch.no_grad():
            self.engine(**self.task.batch(group, self.worker.device).inputs)
        sums = BatchSums()
        for batch, of_batch in zip(batches, zip(*statistics, strict=True), strict=True):
            terms = join_series([measured.terms() for measured in of_batch])
            sums.update(batch, {name: value.numpy() for name, value in terms.items()})
        return sums

    def _batches_at_once(self, block: torch.nn.Module, zero_stage: int) -> int:
        """Batches in one forward pass. Under ZeRO stage 3 each pass gathers every weight: as many as fit.

        With a replica one is as quick as many, and sums that do not depend on the number of workers, to the last bit,
        need passes that do not.
        """
        if zero_stage != 3 or self.task.facts.reads == "images":  # of how many patches an image is, no rule knows
            return 1
        config, collect = self.config, self.config.collect
        width = getattr(torch, config.model.dtype).itemsize
        tokens = collect.batch_size * sum(mask.shape[1] for mask in self.part.masks())
        layers = sum(tap.layers for tap in self.taps)
        a_batch = tokens * activations_per_token(block) * width + layers * collect.samples**2 * 8
        if self.worker.device.type == "cuda":
            a_batch += 2 * AT_ONCE * width  # what layers were given and made, until some are measured together
        free, _ = free_memory(self.worker.device, self.worker.local_workers)
        room = ROOM * free - GATHERED_PARAMETERS * width
        turns = -(-collect.num_batches // self.worker.world_size)
        (most,) = self.worker.least_over_workers(int(min(room // a_batch, turns)))
        self.worker.log(f"{max(most, 1)} batches in a forward pass")
        return max(most, 1)

    def _save(self) -> None:
        if len(self.fresh):
            self.fresh.save(self.folder)
            self.mine.merge(self.fresh)
            self.fresh = BatchSums()


def grouped(part: Part, batches: list[int], config: CollectConfig) -> tuple[Part, list[list[Samples]]]:
    """The rows of these batches, one batch after another, and of each of the part's masks the samples of each batch.

    Texts are padded to the longest of all rows, and positions count in that width; which tokens are drawn does not
    depend on it.
    """
    of_batches = [batch_rows(batch, config.batch_size, len(part)) for batch in batches]
    group = part.rows(chain.from_iterable(of_batches))
    sizes = [len(rows) for rows in of_batches]
    masks = group.masks()
    return group, [
        [
            draw_samples(of_batch, config, batch, of)
            for of_batch, batch in zip(torch.split(torch.from_numpy(mask), sizes), batches, strict=True)
        ]
        for mask, of in zip(masks, OF_MASKS if len(masks) > 1 else ("",), strict=True)
    ]


def require_pairs(stacks: dict[str, list[str]]) -> None:
    """Refuse a model no two layers of which can be compared.

    Args:
        stacks: the names of the layers of each.

    Raises:
        UserError: each stack has one.
    """
    if max(map(len, stacks.values())) < 2:
        raise UserError(f"the model has a single layer in {' and in '.join(stacks)}: there is nothing to compare")


def require_samples(part: Part, config: CollectConfig) -> None:
    """Refuse a calibration some batch of which has too few samples, before any worker starts.

    Raises:
        UserError: which, and how many it has.
    """
    masks = part.masks()
    for batch in range(config.num_batches):
        rows = batch_rows(batch, config.batch_size, len(part))
        for mask, of in zip(masks, OF_MASKS if len(masks) > 1 else ("",), strict=True):
            draw_samples(torch.from_numpy(mask[rows.start : rows.stop]), config, batch, of)


def for_series(samples: list[list[Samples]], series: int) -> list[list[Samples]]:
    """The samples of each series of blocks; where all work on the same text, each has the same."""
    return samples * series if len(samples) == 1 else samples


def _check_sums(reduced: Any, total: Terms) -> None:
    for name, value in total.items():
        here, reduced = reduced[: value.size].reshape(value.shape), reduced[value.size :]
        error = float(np.abs(here - value).max() / max(np.abs(value).max(), np.finfo(np.float64).tiny))
        if not error <= SUM_TOLERANCE:
            raise StageFailure(
                f"the all-reduced sums of {name} differ from the saved ones by {error:.1e} of their size: a worker's "
                "disk or network cannot be trusted"
            )
