"""The DeepSpeed configuration of retraining, and which sequences each worker sees in which step."""

from dataclasses import dataclass

import numpy as np

from mpruner_dist.cluster.settings import Settings, dtype_settings, fill_in
from mpruner_dist.config import RetrainConfig


def training_settings(given: Settings, config: RetrainConfig, dtype: str, workers: int) -> Settings:
    """A user's DeepSpeed configuration, completed from the `retrain` section.

    Raises:
        UserError: the two contradict each other.
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
            # torch's own AdamW: DeepSpeed's fused one is compiled at first use
            "params": {"lr": config.learning_rate, "weight_decay": config.weight_decay, "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": config.steps,
                "warmup_num_steps": config.warmup_steps,
                "warmup_min_ratio": 0.0,
                "warmup_type": "linear",
                "cos_min_ratio": config.min_lr_ratio,
            },
        },
    }
    return fill_in(given, required, defaults)


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
        order = {
            epoch: np.random.default_rng([self.seed, epoch]).permutation(self.num_blocks)
            for epoch in set(epochs.tolist())
        }
        return [int(order[epoch][position]) for epoch, position in zip(epochs.tolist(), positions, strict=True)]

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch_size: int) -> list[list[int]]:
        """A worker's share of the step, cut into micro-batches."""
        rows = self.rows(step)
        stride = world_size * micro_batch_size
        starts = range(rank * micro_batch_size, len(rows), stride)
        return [rows[start : start + micro_batch_size] for start in starts]
