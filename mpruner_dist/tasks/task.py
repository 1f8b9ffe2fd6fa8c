"""What every task has, and the one loss of all of them.

Shape suffixes: B sequences or images, T tokens, V words or classes. Predictions are the places where a model should say
something: tokens that follow others, or whole texts. [B, T] or [B].
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpruner_dist.config.task import TaskFacts
from mpruner_dist.data.parts import Part

IGNORED = -100
"""In the place of a target that nothing must predict."""

P = TypeVar("P", bound=Part, contravariant=True)


@dataclass(frozen=True)
class Batch:
    """What a forward pass is given, and what it should say."""

    inputs: dict[str, Any]
    """Keyword arguments of the model's forward."""
    targets: Tensor
    """The right class of each prediction, int64: the shape of the logits without their last dimension, or IGNORED."""
    state_weights_BT: Tensor | None
    """How much the states at each position count where hidden states are compared: 1 a prediction, all together. None:
    all positions of a row alike, and 1 a row."""


class Task(Protocol[P]):
    """Everything about a task that the stages ask."""

    facts: TaskFacts

    def batch(self, part: P, device: torch.device) -> Batch:
        """These sequences or images as a batch on a device."""

    def predictions(self, part: P) -> npt.NDArray[np.int64]:
        """How many predictions each of them holds, [B]."""

    def size(self, part: P) -> int:
        """How much work they are, in the task's unit."""

    def tally(self, logits: Tensor, batch: Batch) -> Tensor:
        """Sums over the batch's predictions, float64, which may be added to those of others.

        The first two are the negative log-likelihood in nats and the number of predictions.
        """

    def quality(self, tally: list[float]) -> dict[str, float]:
        """What such sums say of the model, under the names of its metrics."""


def summed_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood, float32, summed over all predictions; nothing waits for it.

    Logits for which there is no target are not cut off: that would be a copy, and another on the way back.
    """
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
