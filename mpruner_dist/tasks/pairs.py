"""Saying a text that should follow from another."""

import numpy as np
import numpy.typing as npt
import torch

from mpruner_dist.config.task import FACTS
from mpruner_dist.data.pairs import Pairs
from mpruner_dist.tasks.causal import NextToken
from mpruner_dist.tasks.task import IGNORED, Batch


class NextTargetToken(NextToken):
    """An encoder that reads and a decoder that says; every token of a target is predicted from those before it.

    B pairs, T tokens of what is read, U of what is said.
    """

    facts = FACTS["sequence-to-sequence"]

    def batch(self, part: Pairs, device: torch.device) -> Batch:  # type: ignore[override]
        """Ids and masks [B, T] and [B, U], int64."""
        mask_BT, mask_BU = (torch.from_numpy(mask).to(device) for mask in part.masks())
        target_ids = torch.from_numpy(part.target_ids).long().to(device)
        return Batch(
            {
                "input_ids": torch.from_numpy(part.ids).long().to(device),
                "attention_mask": mask_BT,
                "decoder_input_ids": target_ids[:, :-1],
                "decoder_attention_mask": mask_BU,
                "use_cache": False,
            },
            target_ids[:, 1:].masked_fill(mask_BU == 0, IGNORED),
            None,  # the states of the two stacks lie at places of their own: the configuration refuses to compare them
        )

    def predictions(self, part: Pairs) -> npt.NDArray[np.int64]:  # type: ignore[override]
        """All tokens of the targets."""
        return part.target_lengths.astype(np.int64) - 1

    def size(self, part: Pairs) -> int:  # type: ignore[override]
        """All tokens, read and said."""
        return int(part.lengths.sum() + self.predictions(part).sum())
