"""The DeepSpeed configuration of retraining, and which sequences each worker sees in which step."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mpruner_dist.cluster.settings import Settings, dtype_settings, fill_in
from mpruner_dist.config import RetrainConfig

WIDTH_FIELDS = ("hidden_size", "n_embd", "d_model")

NEEDED = ("warmup_max_lr", "warmup_num_steps", "total_num_steps")
"""What a schedule cannot do without."""


def hidden_size(config: dict[str, Any]) -> int | None:
    """Width of the states between layers, from the content of a `config.json`; None if it does not say."""
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            for name in WIDTH_FIELDS:
                if isinstance(section.get(name), int):
                    return int(section[name])
    return None


def training_settings(given: Settings, config: RetrainConfig, dtype: str, workers: int, width: int | None) -> Settings:
    """A user's DeepSpeed configuration, completed from the `retrain` section.

    What "auto" means where the section does not say it is as in transformers' Trainer (integrations/deepspeed.py).

    Args:
        given: what the user wrote.
        config: the section.
        dtype: of the weights.
        workers: how many.
        width: of the model's hidden states, see `hidden_size`.

    Raises:
        UserError: the two contradict each other, or an "auto" that nothing here answers.
    """
    required = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.batch_size // (config.micro_batch_size * workers),
        **dtype_settings(dtype),
    }
    defaults = {
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "optimizer": {
            "type": "AdamW",
            # torch's own AdamW: DeepSpeed's are compiled at first use, for which not every machine has the tools
            "params": {"lr": config.learning_rate, "weight_decay": config.weight_decay, "torch_adam": True},
        },
        "scheduler": {"type": "WarmupCosineLR", "params": _schedule("WarmupCosineLR", config)},
    }
    answers: Settings = {
        "optimizer": {"type": "AdamW", "params": {
            "lr": config.learning_rate, "weight_decay": config.weight_decay, "betas": [0.9, 0.999], "eps": 1e-8,
        }},
        "scheduler": {"type": "WarmupCosineLR"},
    }  # fmt: skip
    schedule = given.get("scheduler")
    if isinstance(schedule, dict):
        answers["scheduler"]["params"] = _schedule(str(schedule.get("type")), config)
    if width is not None:
        answers["zero_optimization"] = {
            "reduce_bucket_size": width * width,
            "stage3_prefetch_bucket_size": int(0.9 * width * width),
            "stage3_param_persistence_threshold": 10 * width,
        }
    filled = fill_in(given, required, defaults, answers)
    # what else would be DeepSpeed's own, a rate of 1e-3, or missing
    schedule = _schedule(str(filled["scheduler"]["type"]), config)
    needed = {name: schedule[name] for name in NEEDED if name in schedule}
    for section, left_out in (("optimizer", {"lr": config.learning_rate}), ("scheduler", needed)):
        filled[section] = filled[section] | {"params": left_out | (filled[section].get("params") or {})}
    return filled


def _schedule(kind: str, config: RetrainConfig) -> Settings:
    """Parameters of one of DeepSpeed's schedules of the learning rate."""
    warmup = {"warmup_num_steps": max(1, config.warmup_steps), "warmup_type": "linear"}  # DeepSpeed takes no 0
    if kind == "WarmupCosineLR":
        start = 0.0 if config.warmup_steps else 1.0
        return {
            **warmup, "total_num_steps": config.steps, "warmup_min_ratio": start, "cos_min_ratio": config.min_lr_ratio,
        }  # fmt: skip
    rates = {"warmup_min_lr": 0, "warmup_max_lr": config.learning_rate}
    if kind == "WarmupLR":
        return {**warmup, **rates}
    return {**warmup, **rates, "total_num_steps": config.steps} if kind == "WarmupDecayLR" else {}


def most_overflows(settings: Settings) -> int:
    """Steps one after another that float16 may skip while DeepSpeed looks for a scale of the loss.

    It begins at 2^initial_scale_power and, after as many overflows as `hysteresis` says, halves down to min_loss_scale;
    at the next one it raises an error of its own (runtime/fp16/loss_scaler.py). A scale that is given stays.
    """
    given = settings.get("fp16", {})
    halvings = float(given.get("initial_scale_power", 16)) - math.log2(given.get("min_loss_scale", 1) or 1)
    return max(1, int(halvings) + int(given.get("hysteresis", 2)) - 1)


@lru_cache(maxsize=4)
def _permutation(num_blocks: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_blocks)


@dataclass(frozen=True)
class DataOrder:
    """Which training blocks each step sees: fixed by the seed and the step, not by the workers."""

    num_blocks: int
    batch_size: int
    seed: int

    def rows(self, step: int) -> list[int]:
        """Blocks of a step's global batch: each epoch is a permutation of its own."""
        indices = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, positions = np.divmod(indices, self.num_blocks)
        pairs = zip(epochs.tolist(), positions, strict=True)
        return [int(_permutation(self.num_blocks, self.seed, epoch)[position]) for epoch, position in pairs]

    def used(self, steps: int) -> list[int]:
        """Blocks that any of the first steps sees, ascending."""
        return sorted({row for step in range(steps) for row in self.rows(step)})

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch_size: int) -> list[list[int]]:
        """A worker's share of the step, cut into micro-batches."""
        rows = self.rows(step)
        stride = world_size * micro_batch_size
        starts = range(rank * micro_batch_size, len(rows), stride)
        return [rows[start : start + micro_batch_size] for start in starts]
