"""Naming the class of a text or an image."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpruner_dist.config.task import FACTS
from mpruner_dist.data.images import LabelledImages
from mpruner_dist.data.labelled import LabelledTexts
from mpruner_dist.data.parts import Part
from mpruner_dist.tasks.task import Batch, summed_nll


class Classes:
    """What texts and images have in common: one prediction each. B of them, C classes."""

    def predictions(self, part: Part) -> npt.NDArray[np.int64]:
        """One each."""
        return np.ones(len(part), np.int64)

    def size(self, part: Part) -> int:
        """All of them."""
        return len(part)

    def tally(self, logits: Tensor, batch: Batch) -> Tensor:
        """Likelihood, predictions, and of each class how often it was right, was said and was there, each [C]."""
        said_B, there_B = logits.argmax(-1), batch.targets
        right_B = there_B[said_B == there_B]
        counts = [torch.bincount(some, minlength=logits.shape[-1]) for some in (right_B, said_B, there_B)]
        number = torch.tensor([len(there_B)], device=logits.device)
        return torch.cat([summed_nll(logits, there_B).view(1), number, *counts]).double()

    def quality(self, tally: list[float]) -> dict[str, float]:
        """Accuracy, and the mean over the classes of the harmonic mean of precision and recall.

        As scikit-learn's f1_score(average="macro"): over the classes that occur in the data or were predicted, and 0
        for one that is never right.
        """
        hits_C, said_C, there_C = np.array(tally[2:]).reshape(3, -1)
        either_C = said_C + there_C
        f1_C = 2 * hits_C[either_C > 0] / either_C[either_C > 0]
        return {"accuracy": float(hits_C.sum() / tally[1]), "macro_f1": float(f1_C.mean())}


class TextClass(Classes):
    """An encoder or a decoder with a head over whole texts. B texts, T tokens."""

    facts = FACTS["text-classification"]

    def batch(self, part: LabelledTexts, device: torch.device) -> Batch:
        """Ids and mask [B, T], int64; where hidden states are compared, every token of a text counts alike."""
        mask_BT = torch.from_numpy(part.mask()).to(device)
        return Batch(
            {"input_ids": torch.from_numpy(part.ids).long().to(device), "attention_mask": mask_BT},
            torch.from_numpy(part.labels).long().to(device),
            mask_BT / mask_BT.sum(1, keepdim=True),
        )


class ImageClass(Classes):
    """A vision model with a head over whole images. B images, K channels."""

    facts = FACTS["image-classification"]

    def batch(self, part: LabelledImages, device: torch.device) -> Batch:
        """Pixels [B, K, height, width], scaled as the model was trained, float32."""
        pixels = torch.from_numpy(part.pixels).to(device).float() / 255
        mean_K, std_K = (torch.from_numpy(value).to(device)[:, None, None] for value in (part.mean, part.std))
        return Batch({"pixel_values": (pixels - mean_K) / std_K}, torch.from_numpy(part.labels).long().to(device), None)
