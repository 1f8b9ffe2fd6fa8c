"""The section `retrain`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mpruner_dist.config.base import NonNegative, Positive, Section


class DistillationConfig(Section):
    """Learning from the unpruned model's logits."""

    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the distillation loss; the language-model loss has the rest."""
    temperature: Annotated[float, Field(gt=0)] = 1.0


class RetrainConfig(Section):
    """How the pruned model is healed."""

    steps: Positive = 100
    batch_size: Positive = 8
    """Sequences in an optimizer step, over all workers."""
    micro_batch_size: Positive = 1
    """Sequences in one forward and backward of one worker."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    warmup_steps: NonNegative = 10
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    distillation: DistillationConfig | None = None
    zero_stage: Literal[1, 2, 3] = 1
    deepspeed: Path | None = None
    """A DeepSpeed JSON file; what it leaves out or calls "auto" is filled in from this section."""
    save_every: Positive = 50
    """Steps between two sharded checkpoints."""
    keep_checkpoints: Positive = 2
    """The newest so many stay: if the last one is torn, the one before is used."""
    eval_every: Positive = 50
    """Steps between two looks at the validation loss."""
    seed: int = 0

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}")
        return self
