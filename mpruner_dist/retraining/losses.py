"""What retraining minimises. Shape suffixes: B sequences, T tokens, V words of the vocabulary."""

from typing import Any

import torch
from torch import Tensor

from mpruner_dist.config import DistillationConfig


def distillation_loss(student_BTV: Tensor, teacher_BTV: Tensor, mask_BT: Tensor, temperature: float) -> Tensor:
    """KL divergence of the student from the teacher, summed over the tokens that predict a token, float32.

    Hinton et al. 2015 (arXiv 1503.02531), section 2: both softened by the temperature, scaled by its square.
    """
    student = torch.log_softmax(student_BTV[:, :-1].float() / temperature, -1)
    teacher = torch.log_softmax(teacher_BTV[:, :-1].float() / temperature, -1)
    divergence_BT = (teacher.exp() * (teacher - student)).sum(-1)
    return (divergence_BT * mask_BT[:, 1:]).sum() * temperature**2


def mixed_loss(
    nll: Tensor, student_BTV: Tensor, teacher: Any, inputs: dict[str, Any], config: DistillationConfig | None
) -> Tensor:
    """Language-model loss, summed over tokens, mixed with distillation if that is asked for."""
    if config is None:
        return nll
    with torch.no_grad():
        teacher_BTV = teacher(**inputs).logits
    distance = distillation_loss(student_BTV, teacher_BTV, inputs["attention_mask"], config.temperature)
    return (1 - config.weight) * nll + config.weight * distance
