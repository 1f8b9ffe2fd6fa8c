"""What retraining minimises, summed over the predictions of a batch, in float32.

Shape suffixes: B sequences, T tokens, V words of the vocabulary, K likely words, D width. A task that predicts one
class of each sequence has no T in its logits. Nothing here cuts the last token off: of logits [B, T, V] that would be a
copy, and another on the way back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mpruner_dist.config import DistillationConfig
from mpruner_dist.tasks import IGNORED, Batch, summed_nll


@dataclass(frozen=True)
class LikelyWords:
    """What a teacher says of the next word, in short."""

    words_BTK: Tensor
    """Its K likeliest words, int64."""
    log_probs_BTK1: Tensor
    """Their log-probabilities at the temperature, float32, and last that of all other words together."""


@dataclass(frozen=True)
class Answer:
    """What a teacher says of a micro-batch: all of its logits, or the likely words, or neither; hidden states."""

    logits_BTV: Tensor | None
    likely: LikelyWords | None
    hidden_BTD: list[Tensor]


def distillation_loss(student_BTV: Tensor, teacher_BTV: Tensor, targets_BT: Tensor, temperature: float) -> Tensor:
    """KL divergence of the student from the teacher.

    Hinton et al. 2015 (arXiv 1503.02531), section 2: both softened by the temperature, scaled by its square.
    """
    student = torch.log_softmax(_softened(student_BTV, temperature), -1)
    teacher = torch.log_softmax(_softened(teacher_BTV, temperature), -1)
    divergence_BT = (teacher.exp() * (teacher - student)).sum(-1)
    return (divergence_BT * (targets_BT != IGNORED)).sum() * temperature**2


def likely_words(teacher_BTV: Tensor, count: int, temperature: float) -> LikelyWords:
    """The teacher's predictions reduced to `count` words; with all words of the vocabulary, nothing is lost."""
    teacher = _softened(teacher_BTV, temperature)
    words = teacher.topk(count, -1).indices
    return LikelyWords(words, _reduced(teacher, words))


def likely_words_loss(student_BTV: Tensor, likely: LikelyWords, targets_BT: Tensor, temperature: float) -> Tensor:
    """KL divergence over the teacher's K likely words and "any other word" as one outcome.

    At most the divergence over all words (merging outcomes cannot raise it: the data-processing inequality), and equal
    to it where K is all of them.
    """
    student = _reduced(_softened(student_BTV, temperature), likely.words_BTK)
    divergence_BT = (likely.log_probs_BTK1.exp() * (likely.log_probs_BTK1 - student)).sum(-1)
    return (divergence_BT * (targets_BT != IGNORED)).sum() * temperature**2


def _softened(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1 else logits.float() / temperature


def _reduced(logits_BTV: Tensor, words_BTK: Tensor) -> Tensor:
    """Log-probabilities of these words, and of the others together; without others, of the words alone."""
    kept = logits_BTV.gather(-1, words_BTK)
    if words_BTK.shape[-1] < logits_BTV.shape[-1]:
        # summed, not taken from one: what is left of one beside a likely word is lost to rounding
        others = logits_BTV.scatter(-1, words_BTK, float("-inf")).logsumexp(-1, keepdim=True)
        kept = torch.cat([kept, others], -1)
    return torch.log_softmax(kept, -1)


def hidden_loss(student: list[Tensor], teacher: list[Tensor], weights_BT: Tensor | None) -> Tensor:
    """Squared distance of each token's states from the teacher's, relative to theirs; the mean over layers."""
    total = torch.zeros((), device=student[0].device)
    for mine_BTD, theirs_BTD in zip(student, teacher, strict=True):
        theirs = theirs_BTD.float()
        distance_BT = (mine_BTD.float() - theirs).square().sum(-1)
        weights = 1 / distance_BT.shape[1] if weights_BT is None else weights_BT
        total = total + (distance_BT / theirs.square().sum(-1).clamp_min(1e-12) * weights).sum()
    return total / len(student)


def mixed_loss(
    logits_BTV: Tensor,
    hidden_BTD: list[Tensor],
    answer: Answer | None,
    batch: Batch,
    config: DistillationConfig | None,
) -> Tensor:
    """The task's loss mixed with distillation if that is asked for, each by its share.

    Args:
        logits_BTV: of the student.
        hidden_BTD: states after each of its layers, if their distance counts.
        answer: of the teacher, if there is one.
        batch: what should be said.
        config: the shares.
    """
    if config is None or answer is None:
        return summed_nll(logits_BTV, batch.targets)
    targets, loss = batch.targets, torch.zeros((), device=logits_BTV.device)
    rest = 1 - config.weight - config.hidden_weight
    if rest > 0:
        loss = rest * summed_nll(logits_BTV, targets)
    if answer.likely is not None:
        loss = loss + config.weight * likely_words_loss(logits_BTV, answer.likely, targets, config.temperature)
    elif answer.logits_BTV is not None:
        loss = loss + config.weight * distillation_loss(logits_BTV, answer.logits_BTV, targets, config.temperature)
    if config.hidden_weight:
        loss = loss + config.hidden_weight * hidden_loss(hidden_BTD, answer.hidden_BTD, batch.state_weights_BT)
    return loss
