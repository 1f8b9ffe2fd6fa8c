"""The section `evaluate`, and the tasks of the lm-evaluation-harness."""

from pathlib import Path
from typing import Self

from pydantic import model_validator

from mpruner_dist.config.base import NonNegative, Positive, Section


class TaskConfig(Section):
    """A task of the lm-evaluation-harness, an optional extra."""

    name: str
    """As the harness knows it, such as arc_easy."""
    metric: str | None = None
    """Such as acc_norm, or with one of the task's filters exact_match,strict-match; without it, the first that the task
    reports."""
    folder: Path | None = None
    """A folder with task files of your own."""
    fewshot: NonNegative | None = None
    """Examples in the prompt; without it, the task's own number."""
    limit: Positive | None = None
    """Take only the first so many questions."""


class EvaluateConfig(Section):
    """How quality and speed are measured on the test part."""

    batch_size: Positive = 4
    """Sequences in a batch of one worker; plans are judged in such batches too."""
    max_blocks: Positive | None = None
    """At most so many sequences of the test part, and of the validation part (or plan.judge_blocks, if more)."""
    tasks: tuple[TaskConfig, ...] = ()
    """Of causal-lm: tasks of the harness that the original, the pruned and the retrained model are given besides."""

    @model_validator(mode="after")
    def _tasks_are_named_once(self) -> Self:
        names = [task.name for task in self.tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"tasks names {twice[0]} twice: results are told by name")
        return self
