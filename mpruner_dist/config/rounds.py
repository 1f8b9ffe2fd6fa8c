"""The section `rounds`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mpruner_dist.config.base import Positive, Section
from mpruner_dist.config.evaluate import TaskConfig


class RoundsConfig(Section):
    """How often to prune, and what must not be lost. Left out, the road is walked once and nothing is judged."""

    tolerance: Annotated[float, Field(gt=0)]
    """How much worse than the original the metric may be: of perplexity, and of a task of which less is better, a
    share of it, 0.1 is a tenth more; of the others the difference, 0.02 is two points."""
    metric: Literal["perplexity", "accuracy", "macro_f1", "bleu", "chrf", "rouge_l", "word_error_rate", "task"] = (
        "perplexity"
    )
    """What the validation part is measured by, as far as model.task has it; or a task of the harness."""
    task: TaskConfig | None = None
    remove: Positive | None = None
    """Layers that a round removes where plan.method has no threshold; after a roll-back a half, then a third of it,
    rounded up."""
    max_rounds: Positive = 8
    max_stride: Annotated[int, Field(ge=1)] = 3
    """Give up on a model that broke the tolerance at this stride."""

    @model_validator(mode="after")
    def _task_is_named(self) -> Self:
        if (self.metric == "task") != (self.task is not None):
            raise ValueError("metric task and rounds.task go together: give both or neither")
        return self
