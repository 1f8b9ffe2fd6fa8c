"""The stage `retrain`: what every worker does."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from mpruner_dist.checkpoints.export import export_weights, match_names
from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.cluster.engine import gathered, make_engine, start_deepspeed
from mpruner_dist.cluster.settings import inference_settings, zero_stage
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config, RetrainConfig
from mpruner_dist.data.blocks import Blocks, load_blocks
from mpruner_dist.errors import StageFailure
from mpruner_dist.models.engines import inference_engine, load_for
from mpruner_dist.models.scoring import model_inputs, score_text, token_nll
from mpruner_dist.retraining.checkpoints import (
    Found,
    find_checkpoint,
    load_checkpoint,
    loading_settings,
    save_checkpoint,
)
from mpruner_dist.retraining.losses import mixed_loss
from mpruner_dist.retraining.settings import DataOrder, training_settings
from mpruner_dist.runs.commit import commit_folder, write_json, write_text


def retrain_job(worker: Worker, spec: dict[str, Any]) -> None:
    """Retrain, from the newest sharded checkpoint if there is one, and export a Hugging Face folder.

    spec: config (Config), pruned (Path), teacher (Path), train and validation (Path of blocks), work (Path of the
    sharded checkpoints), target (Path), deepspeed (dict).

    Raises:
        UserError: a checkpoint of another run.
        StageFailure: a loss or a weight that is not finite, a full disk.
        Preempted: a signal came; a checkpoint is saved.
    """
    config: Config = spec["config"]
    retrain = _section(config)
    start_deepspeed(worker.device)
    settings = training_settings(spec["deepspeed"], retrain, config.model.dtype, worker.world_size)
    found = find_checkpoint(worker, Path(spec["work"]), settings)
    settings = loading_settings(found, settings)
    pruned = read_checkpoint(Path(spec["pruned"]))
    model = load_for(settings, pruned.path, config.model, worker.log)
    model.train()
    parameters = match_names(model, pruned, str(model.base_model_prefix))
    engine = make_engine(model, settings, list(model.parameters()))
    teacher = None
    if retrain.distillation:
        teacher_settings = inference_settings({}, 3 if zero_stage(settings) == 3 else 0, config.model.dtype)
        teacher = inference_engine(teacher_settings, Path(spec["teacher"]), config.model, worker.log)
    trainer = Trainer(worker, engine, teacher, retrain, Path(spec["work"]))
    trainer.run(load_blocks(spec["train"]), load_blocks(spec["validation"]), config.evaluate.batch_size, found)
    target = Path(spec["target"])
    partial = target.with_name(f".{target.name}.partial")
    export_weights(parameters, pruned, partial, gathered, worker.is_first)
    worker.barrier()
    if worker.is_first:
        read_checkpoint(partial)
        commit_folder(partial, target)
    worker.barrier()


class Trainer:
    """The loop over steps, its log and its sharded checkpoints."""

    def __init__(self, worker: Worker, engine: Any, teacher: Any, config: RetrainConfig, work: Path) -> None:
        self.worker, self.engine, self.teacher, self.config = worker, engine, teacher, config
        self.work = work
        self.metrics_path = work / "metrics.jsonl"

    def run(self, train: Blocks, validation: Blocks, eval_batch_size: int, found: Found | None) -> None:
        """Do the steps that are left."""
        config = self.config
        order = DataOrder(len(train), config.batch_size, config.seed)
        first = load_checkpoint(self.worker, self.engine, self.work, found)
        self._forget_metrics_after(first)
        if self._looks_after(first):  # saved before it was looked at
            self._validate(first, validation, eval_batch_size)
        self.worker.begin_progress("retrain", "steps", config.steps, first)
        for step in range(first, config.steps):
            begun = time.monotonic()
            loss = self._step(step, train, order)
            done = step + 1
            seconds = time.monotonic() - begun
            self._record({"step": done, "loss": loss, "lr": self.engine.get_lr()[0], "seconds": seconds})
            self.worker.tell(done, f"loss {loss:.3f}")
            stops = self.worker.must_stop()
            if done % config.save_every == 0 or done == config.steps or stops:
                save_checkpoint(self.worker, self.engine, self.work, done, config.keep_checkpoints)
            if stops:
                self.worker.stop(f"step {done} of {config.steps} is saved")
            if self._looks_after(done):
                self._validate(done, validation, eval_batch_size)

    def _looks_after(self, step: int) -> bool:
        """Whether the validation loss is measured after so many steps."""
        return step % self.config.eval_every == 0 or step == self.config.steps

    def _step(self, step: int, train: Blocks, order: DataOrder) -> float:
        """One optimizer step; its loss a token, over all workers."""
        worker, config = self.worker, self.config
        torch.manual_seed(hash((config.seed, step, worker.rank)) % 2**63)  # dropout, if any, resumes the same
        micro_batches = order.micro_batches(step, worker.rank, worker.world_size, config.micro_batch_size)
        tokens = int((train.rows(order.rows(step)).lengths - 1).clip(0).sum())
        total = torch.zeros(1, dtype=torch.float64, device=worker.device)
        for rows in micro_batches:
            inputs = model_inputs(train.rows(rows), worker.device)
            logits = self.engine(**inputs).logits
            nll, _ = token_nll(logits, inputs)
            loss = mixed_loss(nll, logits, self.teacher, inputs, config.distillation)
            total += loss.detach().double()
            # DeepSpeed takes the mean over micro-batches and workers; this makes of it the mean over all tokens
            self.engine.backward(loss * (len(micro_batches) * worker.world_size / tokens))
            self.engine.step()
        mean = worker.sum_over_workers(total).item() / tokens
        if not math.isfinite(mean):
            raise StageFailure(
                f"the loss of step {step + 1} is not finite (training blocks {order.rows(step)}): lower "
                f"retrain.learning_rate; the last sharded checkpoint in {self.work} is kept"
            )
        return mean

    def _validate(self, step: int, validation: Blocks, batch_size: int) -> None:
        self.engine.eval()
        score = score_text(self.worker, self.engine, validation, batch_size)
        self.engine.train()
        self._record({"step": step, "validation_loss": score.nll})
        self.worker.log(f"step {step}: validation loss {score.nll:.4f}")

    def _record(self, entry: dict[str, Any]) -> None:
        if self.worker.is_first:
            with self.metrics_path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def _forget_metrics_after(self, step: int) -> None:
        """Drop what an attempt logged after its last sharded checkpoint was saved: that is done again."""
        if not self.worker.is_first:
            return
        self.work.mkdir(parents=True, exist_ok=True)
        lines = self.metrics_path.read_text().splitlines() if self.metrics_path.exists() else []
        entries = [(line, json.loads(line)) for line in lines if line.endswith("}")]
        kept = [line for line, entry in entries if entry["step"] < step or (entry["step"] == step and "loss" in entry)]
        write_text(self.metrics_path, "".join(f"{line}\n" for line in kept))


def _section(config: Config) -> RetrainConfig:
    if config.retrain is None:
        raise StageFailure("there is no retrain section in the configuration")
    return config.retrain


def write_summary(metrics: Path, target: Path) -> None:
    """`retrain.json`: losses by step, from the log of the run."""
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    write_json(target, {
        "loss": [[e["step"], e["loss"]] for e in entries if "loss" in e],
        "validation_loss": [[e["step"], e["validation_loss"]] for e in entries if "validation_loss" in e],
    })  # fmt: skip
