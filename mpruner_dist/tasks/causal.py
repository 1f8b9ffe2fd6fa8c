"""Predicting the next token of a text."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpruner_dist.config.task import FACTS
from mpruner_dist.data.blocks import Blocks
from mpruner_dist.tasks.task import IGNORED, Batch, summed_nll


class Tokens:
    """What all tasks have in common that predict tokens one after another."""

    def tally(self, logits: Tensor, batch: Batch) -> Tensor:
        """Likelihood, predictions, and how many of these were the likeliest word."""
        sums: list[Any] = [
            summed_nll(logits, batch.targets),
            (batch.targets != IGNORED).sum(),
            (logits.argmax(-1) == batch.targets).sum(),
        ]
        return torch.stack([value.double() for value in sums])

    def quality(self, tally: list[float]) -> dict[str, float]:
        """Perplexity, and the share of the tokens that were the likeliest."""
        nll, predictions, hits = tally
        # e^700 still is a float64
        return {"perplexity": math.exp(min(nll / predictions, 700.0)), "accuracy": hits / predictions}


class NextToken(Tokens):
    """A decoder, and blocks of text; every token but a block's first is predicted. B sequences, T tokens."""

    facts = FACTS["causal-lm"]

    def batch(self, part: Blocks, device: torch.device) -> Batch:
        """Ids and mask [B, T], int64."""
        ids_BT = torch.from_numpy(part.ids).long().to(device)
        mask_BT = torch.from_numpy(part.mask()).to(device)
        targets_BT = ids_BT.masked_fill(mask_BT == 0, IGNORED)[:, 1:]
        return Batch(
            {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False},
            torch.nn.functional.pad(targets_BT, (0, 1), value=IGNORED),
            torch.nn.functional.pad(mask_BT[:, 1:], (0, 1)),
        )

    def predictions(self, part: Blocks) -> npt.NDArray[np.int64]:
        """All tokens but the first."""
        return (part.lengths.astype(np.int64) - 1).clip(0)

    def size(self, part: Blocks) -> int:
        """All tokens."""
        return int(part.lengths.sum())
