"""The stage `retrain`: what every worker does."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpruner_dist.checkpoints.export import Exported, export_weights
from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.cluster.engine import gathered, make_engine, start_deepspeed
from mpruner_dist.cluster.settings import zero_stage
from mpruner_dist.cluster.shape import free_memory, require_room_to_load
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config, RetrainConfig
from mpruner_dist.data.parts import Part, load_part
from mpruner_dist.errors import Fruitless, StageFailure
from mpruner_dist.models.engines import load_for
from mpruner_dist.models.scoring import score_part
from mpruner_dist.models.stacks import run_blocks
from mpruner_dist.retraining.checkpoints import (
    Found,
    find_checkpoint,
    load_checkpoint,
    loading_settings,
    save_checkpoint,
)
from mpruner_dist.retraining.hidden import HiddenStates, logits_and_states
from mpruner_dist.retraining.losses import mixed_loss
from mpruner_dist.retraining.metrics import Metrics
from mpruner_dist.retraining.preparation import prepare_model, share_normalisations, trainable
from mpruner_dist.retraining.settings import DataOrder, hidden_size, most_overflows, training_settings
from mpruner_dist.retraining.teacher import Teacher, make_teacher
from mpruner_dist.runs.commit import commit_folder, write_json
from mpruner_dist.tasks import Batch, Task, task_of

EXPORTED = "exported.json"


def retrain_job(worker: Worker, spec: dict[str, Any]) -> None:
    """Retrain, from the newest sharded checkpoint if there is one, and export a Hugging Face folder.

    spec: config (Config), pruned (Path), layers (list of int, the only ones to train, or None), teacher (Path),
    teacher_layers (list of int, for each layer the teacher's that it was), words (Path of the teacher's likely words
    or None), train and validation (Path of blocks), work (Path of the sharded checkpoints), target (Path),
    deepspeed (dict).

    Raises:
        UserError: a checkpoint of another run.
        Fruitless: a loss or a weight that is not finite, or no weight that moved.
        StageFailure: no room to load replicas, a frozen weight that moved, a full disk.
        Preempted: a signal came; a checkpoint is saved.
    """
    config: Config = spec["config"]
    retrain = _section(config)
    start_deepspeed(worker.device)
    pruned = read_checkpoint(Path(spec["pruned"]))
    width = hidden_size(pruned.config)
    settings = training_settings(spec["deepspeed"], retrain, config.model.dtype, worker.world_size, width)
    if zero_stage(settings) != 3:
        _, beside = free_memory(worker.device, worker.local_workers)
        [least] = worker.least_over_workers(beside or 0)
        size = pruned.num_parameters * getattr(torch, config.model.dtype).itemsize
        require_room_to_load(size, worker.world_size, None if beside is None else least)
    found = find_checkpoint(worker, Path(spec["work"]), settings)
    teacher = make_teacher(worker, settings, config, spec)
    model = load_for(settings, pruned.path, config.model, worker.log)
    weights = prepare_model(model, pruned, retrain, spec["layers"])
    unasked = [name for name, weight in weights.items() if not weight.asked]
    if unasked:
        worker.say(f"the model does not ask for {len(unasked)} tensors, such as {unasked[0]}: they stay as they are")
    engine = make_engine(model, loading_settings(found, settings), trainable(model))
    trainer = Trainer(
        worker, engine, task_of(config.model), teacher, retrain, Path(spec["work"]), most_overflows(settings)
    )
    trainer.run(load_part(spec["train"]), load_part(spec["validation"]), config.evaluate.batch_size, found)
    engine.empty_partition_cache()  # under ZeRO stage 3 a forward pass may have left weights on their way
    target = Path(spec["target"])
    partial = target.with_name(f".{target.name}.partial")
    exported = export_weights(weights, pruned, partial, gathered, worker.is_first)
    worker.barrier()
    if worker.is_first:
        require_change(exported, retrain, trainer.metrics.rates())
        read_checkpoint(partial)
        write_json(trainer.work / EXPORTED, asdict(exported))
        commit_folder(partial, target)
    worker.barrier()


class Trainer:
    """The loop over steps, its log and its sharded checkpoints."""

    def __init__(
        self,
        worker: Worker,
        engine: Any,
        task: Task[Any],
        teacher: Teacher | None,
        config: RetrainConfig,
        work: Path,
        most_overflows: int,
    ) -> None:
        self.worker, self.engine, self.task, self.teacher, self.config = worker, engine, task, teacher, config
        self.work, self.most_overflows = work, most_overflows
        self.metrics = Metrics(work, worker.is_first)
        self.hidden: HiddenStates | None = None
        if config.distillation is not None and config.distillation.hidden_weight:
            blocks = run_blocks(engine.module)
            self.hidden = HiddenStates(blocks, list(range(len(blocks))))
        self.skipped = 0  # steps one after another in which gradients overflowed
        self.saved = 0

    def run(self, train: Part, validation: Part, eval_batch_size: int, found: Found | None) -> None:
        """Do the steps that are left."""
        config = self.config
        order = DataOrder(len(train), config.batch_size, config.seed)
        first = self.saved = load_checkpoint(self.worker, self.engine, self.work, found)
        self.metrics.begin(first, config.log_to)
        if self._looks_after(first):  # saved before it was looked at
            self._validate(first, validation, eval_batch_size)
        self.worker.begin_progress("retrain", "steps", config.steps, first)
        predictions = self.task.predictions(train)
        for step in range(first, config.steps):
            begun = time.monotonic()
            rate = self.engine.get_lr()[0]  # the scheduler then sets that of the next step
            loss = self._step(step, train, order, int(predictions[order.rows(step)].sum()))
            share_normalisations(self.worker, self.engine.module)
            done = step + 1
            seconds = time.monotonic() - begun
            self.metrics.record({"step": done, "loss": loss, "lr": rate, "seconds": seconds})
            self.worker.tell(done, f"loss {loss:.3f}")
            stops = self.worker.must_stop()
            if done % config.save_every == 0 or done == config.steps or stops:
                save_checkpoint(self.worker, self.engine, self.work, done, config.keep_checkpoints)
                self.saved = done
            if stops:
                self.metrics.end()
                self.worker.stop(f"step {done} of {config.steps} is saved")
            if self._looks_after(done):
                self._validate(done, validation, eval_batch_size)
        self.metrics.end()

    def _looks_after(self, step: int) -> bool:
        """Whether the validation loss is measured after so many steps."""
        return step % self.config.eval_every == 0 or step == self.config.steps

    def _step(self, step: int, train: Part, order: DataOrder, predictions: int) -> float:
        """One optimizer step, of so many predictions; its loss a prediction, over all workers."""
        worker, config = self.worker, self.config
        seed = hash((config.seed, step, worker.rank))
        torch.manual_seed(seed % 2**63)  # dropout, if any, resumes the same
        np.random.seed(seed % 2**32)  # as do the masks by which transformers' Whisper varies spectra
        micro_batches = order.micro_batches(step, worker.rank, worker.world_size, config.micro_batch_size)
        losses = torch.zeros(len(micro_batches), worker.world_size, dtype=torch.float64, device=worker.device)
        for turn, rows in enumerate(micro_batches):
            loss = self._loss(rows, self.task.batch(train.rows(rows), worker.device))
            losses[turn, worker.rank] = loss.detach()
            # DeepSpeed takes the mean over micro-batches and workers; this makes of it the mean over all predictions
            self.engine.backward(loss * (len(micro_batches) * worker.world_size / predictions))
            self.engine.step()
        losses = worker.sum_over_workers(losses).cpu()
        self.check(step, losses.flatten().isfinite().tolist(), order.rows(step))
        return losses.sum().item() / predictions

    def _loss(self, rows: list[int], batch: Batch) -> torch.Tensor:
        """Of one micro-batch, summed over its predictions."""
        answer = None if self.teacher is None else self.teacher(rows, batch.inputs)
        logits, states = logits_and_states(self.engine, batch.inputs, self.hidden)
        return mixed_loss(logits, states, answer, batch, self.config.distillation)

    def check(self, step: int, finite: list[bool], rows: list[int]) -> None:
        """Stop where going on would train nothing.

        Args:
            step: just done.
            finite: for each micro-batch of the step, over all workers, whether its loss is.
            rows: training blocks of the step, in the order of the micro-batches.

        Raises:
            Fruitless: a loss that is not finite, or float16 that overflows at every scale.
        """
        kept = (
            f"the sharded checkpoint of step {self.saved} is kept"
            if self.saved
            else "no sharded checkpoint was saved before"
        )
        size = self.config.micro_batch_size
        bad = sorted(row for index, row in enumerate(rows) if not finite[index // size])
        if bad:
            raise Fruitless(
                f"the loss of step {step + 1} is not finite (training blocks {bad}): lower "
                f"retrain.learning_rate, or set model.dtype bfloat16 or float32; {kept}"
            )
        self.skipped = 0 if self.engine.was_step_applied() else self.skipped + 1
        if self.skipped >= self.most_overflows:
            dtype = str(next(self.engine.module.parameters()).dtype).removeprefix("torch.")
            way = (
                "set model.dtype bfloat16 or"
                if dtype == "float16"
                else "lower retrain.learning_rate, or set model.dtype"
            )
            raise Fruitless(
                f"the gradients of {self.skipped} steps one after another, up to step {step + 1}, overflow {dtype}, "
                f"however small the loss is scaled: {way} float32; {kept}"
            )

    def _validate(self, step: int, validation: Part, batch_size: int) -> None:
        """Record the validation loss.

        Raises:
            Fruitless: it is not finite.
        """
        self.engine.eval()
        try:
            score = score_part(self.worker, self.engine, self.task, validation, batch_size)
        except Fruitless as error:
            also = ", or lower retrain.learning_rate" if step else ""
            raise Fruitless(f"after {step} steps {error}{also}") from error
        self.engine.train()
        self.metrics.record({"step": step, "validation_loss": score.loss})
        self.worker.log(f"step {step}: validation loss {score.loss:.4f}")


def require_change(exported: Exported, config: RetrainConfig, rates: list[float]) -> None:
    """Training that moved no weight has failed, whatever its losses say.

    Args:
        exported: what the tensors were.
        config: of the training.
        rates: of learning, step by step.

    Raises:
        Fruitless: no trained tensor differs.
    """
    if exported.changed_tensors:
        return
    nothing = f"none of the {exported.trained_tensors} trained tensors has changed after {config.steps} steps"
    if not any(rates):
        lower = f", or lower retrain.warmup_steps {config.warmup_steps}" if config.warmup_steps else ""
        raise Fruitless(
            f"{nothing}, for the learning rate was 0 in all of them: DeepSpeed's first step has none, nor has "
            f"the second of a warm-up; raise retrain.steps{lower}"
        )
    raise Fruitless(
        f"{nothing}: raise retrain.learning_rate, or set model.dtype float32 if it is too small for the number type"
    )


def _section(config: Config) -> RetrainConfig:
    if config.retrain is None:
        raise StageFailure("there is no retrain section in the configuration")
    return config.retrain


def write_summary(work: Path, target: Path) -> None:
    """`retrain.json`: losses by step, from the log of the run, and what was trained, from its export."""
    entries = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    write_json(target, {
        "loss": [[e["step"], e["loss"]] for e in entries if "loss" in e],
        "validation_loss": [[e["step"], e["validation_loss"]] for e in entries if "validation_loss" in e],
        "weights": json.loads((work / EXPORTED).read_text()),
    })  # fmt: skip
