"""The section `retrain`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mpruner_dist.config.base import NonNegative, Positive, Section


class DistillationConfig(Section):
    """Learning from an unpruned model. What the weights leave over, the task's own loss has."""

    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the divergence from the teacher's predictions."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of both before they are compared: above 1, unlikely words count for more."""
    top_k: Positive | None = None
    """Compare the teacher's so many likeliest words, and all others as if they were one; without it, all words."""
    hidden_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the distance of each layer's hidden states from those of the layer that it was in the teacher."""
    teacher: str | None = None
    """Folder or hub id of another teacher than the unpruned model, with the same vocabulary."""
    cache: bool = False
    """Ask the teacher once, before training, and keep its `top_k` words on disk."""

    @model_validator(mode="after")
    def _weights_are_shares(self) -> Self:
        total = self.weight + self.hidden_weight
        if not 0 < total <= 1:
            raise ValueError(f"weight {self.weight} + hidden_weight {self.hidden_weight} must be above 0 and at most 1")
        if self.top_k is not None and not self.weight:
            raise ValueError("top_k compares predictions, whose weight is 0: leave top_k out or raise weight")
        return self

    @model_validator(mode="after")
    def _cache_holds_few_words(self) -> Self:
        if self.cache and self.top_k is None:
            raise ValueError("cache needs top_k: all words of every token do not fit on a disk")
        if self.cache and self.hidden_weight:
            raise ValueError("cache holds no hidden states: set cache false or hidden_weight 0")
        return self


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685) in the layers, merged into the weights at the end."""

    rank: Positive = 16
    """Width of an adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """What the adapters add is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Which projections of a layer, by the last parts of their names, such as [q_proj, v_proj]."""


class RetrainConfig(Section):
    """How the pruned model is healed."""

    steps: Positive = 100
    """Optimizer steps; with rounds, of each round."""
    batch_size: Positive = 8
    """Sequences in an optimizer step, over all workers."""
    micro_batch_size: Positive = 1
    """Sequences in one forward and backward of one worker."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """The highest: reached at the end of the warm-up, from where it falls along a cosine."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Where the learning rate ends, as a share of its highest."""
    warmup_steps: NonNegative = 10
    """Steps in which it rises from 0; DeepSpeed's schedules leave it there for the first two."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Longer gradients are scaled down to this norm."""
    trainable: Literal["all", "neighbours"] = "all"
    """neighbours, as MPruner publishes it: only the layers beside a gap; the others, embeddings and head are frozen."""
    lora: LoraConfig | None = None
    """Train adapters in the layers (that `trainable` names), not the weights."""
    distillation: DistillationConfig | None = None
    activation_checkpointing: bool = False
    """Keep only what goes into each layer, and compute the rest again on the way back: less memory, slower."""
    zero_stage: Literal[1, 2, 3] = 1
    """What the workers divide among them: 1 the optimizer's state, 2 gradients too, 3 weights too."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON file; what it leaves out or calls "auto" is filled in from this section. Batch sizes and number
    types that contradict the configuration are refused; else the file goes before this section."""
    save_every: Positive = 50
    """Steps between two sharded checkpoints."""
    keep_checkpoints: Positive = 2
    """The newest so many stay: if the last one is torn, the one before is used."""
    eval_every: Positive = 50
    """Steps between two looks at the validation loss."""
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where losses go besides `metrics.jsonl`."""
    seed: int = 0
    """Of the order of the data, of dropout and of new adapters."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}")
        return self
