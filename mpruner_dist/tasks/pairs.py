"""Saying a text that should follow from another, or that is spoken in a recording."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpruner_dist.config.task import FACTS
from mpruner_dist.data.pairs import Pairs, Targets
from mpruner_dist.data.speech import Speech
from mpruner_dist.tasks.causal import Tokens
from mpruner_dist.tasks.task import IGNORED, Batch


class TargetTokens(Tokens):
    """Every token of a target is predicted from those before it, but for those that all targets begin with."""

    def predictions(self, part: Targets) -> npt.NDArray[np.int64]:
        """All tokens of the targets but those that all begin with."""
        return part.target_lengths.astype(np.int64) - part.prompt

    def size(self, part: Pairs | Speech) -> int:
        """All tokens, read and said; of a recording, the places that an encoder makes of what is heard."""
        return int(part.lengths.sum() + self.predictions(part).sum())


class NextTargetToken(TargetTokens):
    """An encoder that reads and a decoder that says. B pairs, T tokens of what is read, U of what is said."""

    facts = FACTS["sequence-to-sequence"]

    def batch(self, part: Pairs, device: torch.device) -> Batch:
        """Ids and masks [B, T] and [B, U], int64."""
        ids_BT, mask_BT = (torch.from_numpy(value).long().to(device) for value in (part.ids, part.mask()))
        return said_of({"input_ids": ids_BT, "attention_mask": mask_BT}, part, device)


class SpokenToken(TargetTokens):
    """An encoder that hears and a decoder that says. B recordings, K bands, F frames."""

    facts = FACTS["automatic-speech-recognition"]

    def batch(self, part: Speech, device: torch.device) -> Batch:
        """Spectra [B, K, F], float32: the model hears the silence behind a recording too."""
        return said_of({"input_features": torch.from_numpy(part.features).to(device)}, part, device)


def said_of(read: dict[str, torch.Tensor], part: Targets, device: torch.device) -> Batch:
    """What an encoder is given, with the targets [B, U] for the decoder, int64."""
    ids_BU, mask_BU = (torch.from_numpy(value).long().to(device) for value in (part.target_ids, part.target_mask()))
    targets_BU = ids_BU[:, 1:].masked_fill(mask_BU == 0, IGNORED)
    targets_BU[:, : part.prompt - 1] = IGNORED
    decoder: dict[str, Any] = {
        "decoder_input_ids": ids_BU[:, :-1], "decoder_attention_mask": mask_BU, "use_cache": False
    }  # fmt: skip
    # the states of the two stacks lie at places of their own: the configuration refuses to compare them
    return Batch(read | decoder, targets_BU, None)
