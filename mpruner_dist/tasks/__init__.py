"""What a model is for: which class of transformers it is, what it is given, what it should say, how good it is."""

from typing import Any

from mpruner_dist.config import ModelConfig
from mpruner_dist.tasks.causal import NextToken
from mpruner_dist.tasks.classification import ImageClass, TextClass
from mpruner_dist.tasks.pairs import NextTargetToken, SpokenToken
from mpruner_dist.tasks.task import IGNORED, Batch, Task, summed_nll

__all__ = ["IGNORED", "TASKS", "Batch", "Task", "summed_nll", "task_of"]

TASKS: dict[str, Task[Any]] = {
    "causal-lm": NextToken(),
    "text-classification": TextClass(),
    "image-classification": ImageClass(),
    "sequence-to-sequence": NextTargetToken(),
    "automatic-speech-recognition": SpokenToken(),
}
"""By `model.task`."""


def task_of(config: ModelConfig) -> Task[Any]:
    """The task that a model is configured for."""
    return TASKS[config.task]
