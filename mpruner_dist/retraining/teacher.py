"""The teacher: a model beside the one that is trained, or its likeliest words from disk."""

import gc
from pathlib import Path
from typing import Any, Protocol

import torch

from mpruner_dist.cluster.engine import let_go
from mpruner_dist.cluster.settings import Settings, inference_settings, zero_stage
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config, DistillationConfig
from mpruner_dist.data.parts import load_part
from mpruner_dist.models.engines import inference_engine
from mpruner_dist.models.stacks import run_blocks
from mpruner_dist.retraining.hidden import HiddenStates, logits_and_states
from mpruner_dist.retraining.likely_words import WordsOnDisk, write_likely_words
from mpruner_dist.retraining.losses import Answer, likely_words
from mpruner_dist.retraining.settings import DataOrder
from mpruner_dist.tasks import task_of


class Teacher(Protocol):
    """Whoever answers."""

    def __call__(self, rows: list[int], inputs: dict[str, Any]) -> Answer:
        """What it says of these training blocks, whose ids and mask are `inputs`."""


class LiveTeacher:
    """A model in memory."""

    def __init__(self, engine: Any, config: DistillationConfig, layers: list[int]) -> None:
        """`layers`: whose hidden states are wanted, one for each layer of the student."""
        self.engine, self.config = engine, config
        self.hidden = HiddenStates(run_blocks(engine.module), layers) if config.hidden_weight else None

    @torch.no_grad()
    def __call__(self, rows: list[int], inputs: dict[str, Any]) -> Answer:
        """One forward pass."""
        logits, states = logits_and_states(self.engine, inputs, self.hidden)
        if not self.config.weight:
            return Answer(None, None, states)
        if self.config.top_k is None:
            return Answer(logits, None, states)
        return Answer(None, likely_words(logits, self.config.top_k, self.config.temperature), states)


class CachedTeacher:
    """What a model said once."""

    def __init__(self, words: WordsOnDisk) -> None:
        self.words = words

    def __call__(self, rows: list[int], inputs: dict[str, Any]) -> Answer:
        """Read from disk."""
        return Answer(None, self.words.read(rows, inputs["input_ids"].device), [])


def make_teacher(worker: Worker, settings: Settings, config: Config, spec: dict[str, Any]) -> Teacher | None:
    """The teacher that `retrain.distillation` asks for; one that is cached leaves no model in memory.

    Args:
        worker: this one.
        settings: of the student's engine; the teacher is partitioned and offloaded as it is.
        config: of the run.
        spec: teacher (Path), teacher_layers (list of int), train (Path of blocks), words (Path of the cache or None).
    """
    retrain = config.retrain
    if retrain is None or retrain.distillation is None:
        return None
    distillation, folder = retrain.distillation, Path(spec["teacher"])

    def load() -> Any:
        return inference_engine(teacher_settings(settings, config.model.dtype), folder, config.model, worker.log)

    if not distillation.cache:
        return LiveTeacher(load(), distillation, spec["teacher_layers"])
    blocks = load_part(spec["train"])
    order = DataOrder(len(blocks), retrain.batch_size, retrain.seed)
    words = WordsOnDisk(Path(spec["words"]), order.used(retrain.steps))
    missing = worker.select_on_first(range(words.chunks), words.is_missing)
    if missing:
        teacher = LiveTeacher(load(), distillation, [])
        write_likely_words(worker, teacher, task_of(config.model), blocks, words, missing, retrain.micro_batch_size)
        let_go(teacher.engine)
        del teacher
        gc.collect()
        if worker.device.type == "cuda":
            torch.cuda.empty_cache()
    return CachedTeacher(words)


def teacher_settings(student: Settings, dtype: str) -> Settings:
    """A DeepSpeed configuration for the teacher, its weights divided and offloaded as the student's are."""
    if zero_stage(student) != 3:
        return inference_settings({}, 0, dtype)
    zero: Settings = {"stage": 3}
    given = {name: student[name] for name in ("aio",) if name in student}
    offload = student["zero_optimization"].get("offload_param")
    if offload:
        # DeepSpeed empties the folder when a model comes: each has one of its own
        own = {"nvme_path": f"{offload['nvme_path']}/teacher"} if offload.get("nvme_path") else {}
        zero["offload_param"] = {**offload, **own}
    return inference_settings({**given, "zero_optimization": zero}, 3, dtype)
