"""What is compared: tokens, images or whole sequences, and which of them a batch gives.

Shape suffixes: B sequences or images, T tokens, or places in an image, N samples, D features.
"""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpruner_dist.config import CollectConfig
from mpruner_dist.errors import UserError
from mpruner_dist.similarity.hsic import MIN_SAMPLES

PERMUTATIONS = 4
"""Shuffles of each batch for the null; each gives all pairs of layers."""


@dataclass(frozen=True)
class Samples:
    """The samples of one batch, in random order."""

    unit: str
    positions_N: Tensor
    """Of a token in the flattened batch; of a sequence or image in the batch. int64."""
    eligible_BT: Tensor
    """What a sequence is averaged over. bool."""
    seed: int

    @property
    def groups_N(self) -> Tensor:
        """The sequence or image that each sample comes from, int64."""
        if self.unit == "token":
            return self.positions_N // self.eligible_BT.shape[1]
        return self.positions_N

    def to(self, device: torch.device) -> "Samples":
        """The same on another device: taking from every layer then copies no positions there."""
        return replace(self, positions_N=self.positions_N.to(device), eligible_BT=self.eligible_BT.to(device))

    def take(self, hidden: Tensor) -> Tensor:
        """Feature vectors [N, D] of the samples, in the dtype of `hidden`.

        Args:
            hidden: [B, T, D], or [B, D, height, width] as convolutions make it.
                An image is all its features in a row, as MPruner takes it; a sequence is the mean of its tokens.
        """
        hidden_BTD = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
        positions_N = self.positions_N.to(hidden.device)
        if self.unit == "image":
            return hidden_BTD[positions_N].flatten(1)
        if self.unit == "sequence":
            weights_BT = self.eligible_BT.to(hidden.device)[positions_N].float()
            weights_BT = weights_BT / weights_BT.sum(1, keepdim=True)
            return torch.einsum("bt,btd->bd", weights_BT, hidden_BTD[positions_N].float())
        return hidden_BTD.flatten(0, 1)[positions_N]

    def orders(self, num_samples: int) -> Tensor:
        """Permutations [R, N] of so many samples, for the null."""
        generator = torch.Generator().manual_seed(self.seed ^ 1)
        return torch.stack([torch.randperm(num_samples, generator=generator) for _ in range(PERMUTATIONS)])


def draw_samples(mask_BT: Tensor, config: CollectConfig, batch: int, of: str = "") -> Samples:
    """Draw a batch's samples: text only, the first tokens of a sequence left out.

    The draw depends on the seed and the batch id alone, never on the worker or the device.

    Args:
        mask_BT: 1 for text, 0 for padding; all ones for images.
        config: unit, number, tokens to skip.
        batch: its global id.
        of: what the mask is of, for the message, where a batch has several.

    Raises:
        UserError: fewer samples to draw from than are asked for.
    """
    eligible_BT = mask_BT.bool().clone()
    if config.unit != "image":
        eligible_BT[:, : config.skip_tokens] = False
    if config.unit == "token":
        positions = eligible_BT.flatten().nonzero().squeeze(1)
        # a short sentence is all the sample that this estimator knows
        least = MIN_SAMPLES if config.estimator == "sentence" else config.samples
    else:
        positions = eligible_BT.any(1).nonzero().squeeze(1)
        least = MIN_SAMPLES
    if len(positions) < least:
        fewer = "lower collect.samples, or " if least == config.samples else ""
        raise UserError(
            f"calibration batch {batch} has {len(positions)} {config.unit} samples to draw from{of}, {least} are "
            f"needed: {fewer}raise collect.batch_size"
        )
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{batch}".encode()).digest()[:8], "little") >> 1
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))
    return Samples(config.unit, positions[order[: config.samples]], eligible_BT, seed)
