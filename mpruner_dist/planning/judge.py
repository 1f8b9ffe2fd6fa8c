"""Losses of plans on the workers: nothing is rewritten, layers are left out of the forward pass.

Every worker makes the same plan from the same losses; they share the work of measuring those.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mpruner_dist.cluster.engine import start_deepspeed
from mpruner_dist.cluster.settings import zero_stage
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config
from mpruner_dist.data.blocks import num_batches, turns_of
from mpruner_dist.data.model_folder import read_config
from mpruner_dist.data.parts import Part, load_part
from mpruner_dist.models.blocks import plain_blocks, skipped
from mpruner_dist.models.engines import forward_settings, inference_engine, logits_bytes
from mpruner_dist.models.scoring import forward
from mpruner_dist.models.stacks import run_blocks
from mpruner_dist.planning.losses import Kept, Losses
from mpruner_dist.runs.commit import write_json
from mpruner_dist.tasks import Batch, summed_nll, task_of

Rows = tuple[int, int, int]
"""Blocks of a batch: the first, the end, and from one to the next."""

PAIRS_AT_ONCE = 4
"""Forward passes of a worker between two saves."""


def judge_job(worker: Worker, spec: dict[str, Any]) -> None:
    """Plan by losses and write what comes of it, `result.json`, into the work folder.

    spec: config (Config), model (Path), blocks (Path), work (Path), deepspeed (dict), texts (dict of name -> (first,
    end): which blocks each text is made of), task (returns what JSON can hold; called with a function by each of these
    names, which makes the Losses on that text), passes (float: how many they will be, for the progress).
    """
    work = Path(spec["work"])
    judge = WorkersJudge(worker, spec["config"], spec, work / "losses.jsonl")
    worker.begin_progress("plan", "passes", round(spec["passes"]))
    texts = {name: partial(judge.losses, *rows) for name, rows in spec["texts"].items()}
    result = spec["task"](**texts)
    if worker.is_first:
        write_json(work / "result.json", result)
    worker.barrier()  # nobody leaves while others still compute


class WorkersJudge:
    """The model with all its layers, and every loss that this or an earlier attempt measured with it."""

    def __init__(self, worker: Worker, config: Config, spec: dict[str, Any], file: Path) -> None:
        self.worker, self.config, self.file = worker, config, file
        self.known: dict[tuple[Kept, Rows], float] = {}
        # the first worker alone reads what an earlier attempt saved, and tells: see `select_on_first`
        self.saved = read_losses(file) if worker.is_first else {}
        start_deepspeed(worker.device)
        model = Path(spec["model"])
        logits = logits_bytes(config, read_config(model, config.model.trust_remote_code))
        settings = forward_settings(worker, spec["deepspeed"], config, model, logits)
        self.task = task_of(config.model)
        self.part: Part = load_part(spec["blocks"])
        self.engine = inference_engine(settings, model, config.model, worker.log)
        self.stack = run_blocks(self.engine.module)
        self.divided = zero_stage(settings) == 3
        self.plain = plain_blocks(self.stack, lambda: self._logits(range(1)))
        self.told, self.expected = 0.0, round(spec["passes"])

    def losses(self, first: int, end: int) -> Losses:
        """Losses on the blocks from `first` to `end`, in batches of at most `evaluate.batch_size`.

        Of B batches each takes every B-th block, so that none holds one topic of the text alone.
        """
        batches = num_batches(end - first, self.config.evaluate.batch_size)
        rows = [(begin, end, batches) for begin in range(first, first + batches)]
        every = self.task.predictions(self.part)
        predictions = [int(every[slice(*batch)].sum()) for batch in rows]

        def judge(pairs: list[tuple[Kept, int]]) -> list[float]:
            found = self.measure([(kept, rows[batch]) for kept, batch in pairs])
            self.told += sum(predictions[batch] for _, batch in pairs) / sum(predictions)
            self.worker.tell(min(round(self.told), self.expected))
            return found

        return Losses(judge, predictions, len(self.stack))

    def measure(self, pairs: list[tuple[Kept, Rows]]) -> list[float]:
        """Summed negative log-likelihoods; the same on every worker. Each pair is computed by one of them alone."""
        self._recall([pair for pair in pairs if pair not in self.known])
        todo = [pair for pair in pairs if pair not in self.known]
        at_once = PAIRS_AT_ONCE * self.worker.world_size
        for start in range(0, len(todo), at_once):
            self._measure(todo[start : start + at_once])
        return [self.known[pair] for pair in pairs]

    def _recall(self, pairs: list[tuple[Kept, Rows]]) -> None:
        """Take over from the first worker what an earlier attempt saved of these."""
        found = self.worker.select_on_first(pairs, self.saved.__contains__)
        if found:
            losses = torch.tensor([self.saved.get(pair, 0.0) for pair in found], dtype=torch.float64)
            losses = self.worker.sum_over_workers(losses.to(self.worker.device))
            self.known |= dict(zip(found, losses.tolist(), strict=True))

    def _measure(self, pairs: list[tuple[Kept, Rows]]) -> None:
        found = torch.zeros(len(pairs), dtype=torch.float64, device=self.worker.device)
        # under ZeRO stage 3 all must run the same blocks at the same time: a plan at a time, its batches divided
        plans = list(dict.fromkeys(kept for kept, _ in pairs)) if self.divided else [None]
        for plan in plans:
            group = [number for number, (kept, _) in enumerate(pairs) if plan in (None, kept)]
            for number, counts in turns_of(group, self.worker.rank, self.worker.world_size):
                if counts:
                    found[number] = self._forward(*pairs[number])
                elif self.divided:
                    self._forward(*pairs[number])
        self.worker.sum_over_workers(found)
        self.known |= dict(zip(pairs, found.tolist(), strict=True))
        if self.worker.is_first:
            append_losses(self.file, pairs, found.tolist())
        if self.worker.must_stop():
            self.worker.stop("the losses that were measured are saved")

    def _forward(self, kept: Kept, rows: Rows) -> float:
        out = [layer for layer in range(len(self.stack)) if layer not in kept]
        with skipped(self.stack, out, self.plain):
            logits, batch = self._logits(range(*rows))
        return float(summed_nll(logits, batch.targets))

    def _logits(self, rows: range) -> tuple[torch.Tensor, Batch]:
        return forward(self.worker, self.engine, self.task, self.part.rows(rows))


def append_losses(file: Path, pairs: Sequence[tuple[Kept, Rows]], found: list[float]) -> None:
    """Add losses to those that are saved, a line each."""
    lines = [json.dumps([kept, rows, nll]) for (kept, rows), nll in zip(pairs, found, strict=True)]
    with file.open("a") as saved:
        saved.write("".join(f"\n{line}" for line in lines))  # a line that a kill tore ends here


def read_losses(file: Path) -> dict[tuple[Kept, Rows], float]:
    """The losses that are saved; a line that was torn by a kill is none."""
    found: dict[tuple[Kept, Rows], float] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            kept, (first, end, step), nll = json.loads(line)
            found[tuple(kept), (first, end, step)] = float(nll)
        except (ValueError, TypeError):
            continue
    return found
