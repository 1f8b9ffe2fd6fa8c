"""The loss of a text, what retraining minimises, and which sequences it sees."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import DistillationConfig
from mpruner_dist.data.blocks import Blocks
from mpruner_dist.errors import Fruitless
from mpruner_dist.models.scoring import score_part
from mpruner_dist.retraining.losses import (
    Answer,
    distillation_loss,
    hidden_loss,
    likely_words,
    likely_words_loss,
    mixed_loss,
)
from mpruner_dist.retraining.settings import DataOrder
from mpruner_dist.tasks import IGNORED, TASKS, Batch, summed_nll

WORDS, TOKENS = 11, 9
CPU = torch.device("cpu")
NEXT_TOKEN = TASKS["causal-lm"]


def some_blocks(lengths: list[int], seed: int = 0) -> Blocks:
    ids = np.random.default_rng(seed).integers(0, WORDS, (len(lengths), TOKENS)).astype(np.int32)
    return Blocks(ids, np.array(lengths, np.int32))


class Bigrams:
    """An engine that predicts each next token from the last one alone."""

    def __init__(self) -> None:
        self.table = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(1)) * 2
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, **inputs: Any) -> Any:
        self.shapes.append(tuple(inputs["input_ids"].shape))
        return SimpleNamespace(logits=self.table[inputs["input_ids"]])


def naive_nll(logits: Tensor, blocks: Blocks) -> tuple[float, int]:
    total, count = 0.0, 0
    for row, length in enumerate(blocks.lengths):
        for position in range(length - 1):
            scores = [math.exp(float(score)) for score in logits[row, position]]
            total -= math.log(scores[int(blocks.ids[row, position + 1])] / sum(scores))
            count += 1
    return total, count


def batch_of(blocks: Blocks) -> Batch:
    return NEXT_TOKEN.batch(blocks, CPU)


def nll_of(logits: Tensor, blocks: Blocks) -> Tensor:
    return summed_nll(logits, batch_of(blocks).targets)


def worker(folder: Path) -> Worker:
    return Worker(0, 1, 0, 1, "cpu", folder, "evaluate")


@settings(max_examples=30)
@given(st.lists(st.integers(2, TOKENS), min_size=1, max_size=5), st.integers(0, 1000))
def test_token_nll_is_a_loop_over_the_text(lengths: list[int], seed: int) -> None:
    blocks = some_blocks(lengths, seed)
    logits = torch.randn(len(blocks), TOKENS, WORDS, generator=torch.Generator().manual_seed(seed))
    nll = nll_of(logits, blocks)
    expected, expected_count = naive_nll(logits, blocks)
    assert (NEXT_TOKEN.predictions(blocks).sum(), nll.dtype) == (expected_count, torch.float32)
    assert NEXT_TOKEN.tally(logits, batch_of(blocks))[:2].tolist() == [float(nll), expected_count]
    assert float(nll) == pytest.approx(expected, rel=1e-5)


def test_padding_does_not_count_whatever_stands_there() -> None:
    blocks = some_blocks([5, TOKENS])
    logits = torch.randn(2, TOKENS, WORDS, generator=torch.Generator().manual_seed(2))
    before = NEXT_TOKEN.tally(logits, batch_of(blocks))[:2].tolist()
    other = blocks.ids.copy()
    other[0, 5:] = (other[0, 5:] + 1) % WORDS
    spoiled = logits.clone()
    spoiled[0, 4:] = 100 * torch.randn(TOKENS - 4, WORDS)  # what is predicted after the last token of the text
    after = NEXT_TOKEN.tally(spoiled, batch_of(Blocks(other, blocks.lengths)))[:2].tolist()
    assert after == before == [before[0], 4 + 8]
    spoiled[0, 3] += torch.arange(WORDS)
    assert float(nll_of(spoiled, blocks)) != before[0]


def test_low_precision_logits_are_summed_in_float32() -> None:
    blocks = some_blocks([TOKENS] * 40)
    logits = torch.randn(40, TOKENS, WORDS, generator=torch.Generator().manual_seed(2)).bfloat16()
    nll = nll_of(logits, blocks)
    assert float(nll) == pytest.approx(naive_nll(logits.float(), blocks)[0], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_score_is_the_mean_over_tokens_not_over_batches(tmp_path: Path, batch_size: int) -> None:
    blocks, engine = some_blocks([9, 2, 9, 3, 2]), Bigrams()
    score = score_part(worker(tmp_path), engine, NEXT_TOKEN, blocks, batch_size)
    expected, count = naive_nll(engine.table[torch.from_numpy(blocks.ids).long()], blocks)
    assert score.predictions == count == 8 + 1 + 8 + 2 + 1
    assert score.loss == pytest.approx(expected / count, rel=1e-5)
    assert score.seconds >= 0
    hits = sum(
        int(engine.table[int(row[place])].argmax()) == int(row[place + 1])
        for row, length in zip(blocks.ids, blocks.lengths, strict=True)
        for place in range(length - 1)
    )
    assert score.quality["accuracy"] == hits / count
    assert hits > 0
    per_block = [naive_nll(engine.table[torch.from_numpy(blocks.rows([i]).ids).long()], blocks.rows([i]))
                 for i in range(5)]  # fmt: skip
    assert abs(score.loss - sum(nll / n for nll, n in per_block) / 5) > 0.01  # the mean of means is another number


def test_scoring_covers_every_block_once_after_a_warm_up_and_tells(tmp_path: Path) -> None:
    engine, told = Bigrams(), []
    score_part(worker(tmp_path), engine, NEXT_TOKEN, some_blocks([9] * 7), 3, told.append)
    assert engine.shapes == [(1, 9), (3, 9), (3, 9), (1, 9)]
    assert told == [1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_fails_the_stage(tmp_path: Path, value: float) -> None:
    engine = Bigrams()
    engine.table[:, 0] = value
    with pytest.raises(Fruitless, match="not finite"):
        score_part(worker(tmp_path), engine, NEXT_TOKEN, some_blocks([9, 9]), 2)


def test_a_decoder_is_given_ids_and_mask() -> None:
    inputs = batch_of(some_blocks([2, 9])).inputs
    assert inputs["input_ids"].dtype == inputs["attention_mask"].dtype == torch.int64
    assert inputs["attention_mask"].tolist() == [[1, 1] + [0] * 7, [1] * 9]
    assert inputs["use_cache"] is False


def some_logits(seed: int) -> Tensor:
    return torch.randn(3, TOKENS, WORDS, generator=torch.Generator().manual_seed(seed)) * 2


MASK = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 2 + [0] * 7])
PREDICTING = torch.nn.functional.pad(MASK[:, 1:], (0, 1))
TARGETS = torch.where(PREDICTING == 1, 3, IGNORED)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_distillation_is_zero_for_equal_logits_and_positive_else(temperature: float) -> None:
    one, other = some_logits(1), some_logits(2)
    assert float(distillation_loss(one, one, TARGETS, temperature)) == pytest.approx(0, abs=1e-5)
    assert float(distillation_loss(one, one + 5.0, TARGETS, temperature)) == pytest.approx(0, abs=1e-4)
    assert float(distillation_loss(one, other, TARGETS, temperature)) > 1
    masked = torch.where(MASK[..., None].roll(-1, 1) * (torch.arange(TOKENS)[None, :, None] < 8) == 1, one, other)
    assert float(distillation_loss(one, masked, TARGETS, temperature)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_distillation_and_its_gradient_are_those_of_torch(temperature: float) -> None:
    teacher = some_logits(2)
    mine, reference = some_logits(1).requires_grad_(), some_logits(1).requires_grad_()
    loss = distillation_loss(mine, teacher, TARGETS, temperature)
    counted = MASK[:, 1:].bool()
    expected = temperature**2 * torch.nn.KLDivLoss(reduction="sum", log_target=True)(
        (reference[:, :-1][counted] / temperature).log_softmax(-1),
        (teacher[:, :-1][counted] / temperature).log_softmax(-1),
    )
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    expected.backward()
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-4, atol=1e-6)
    assert (mine.grad[1, 3:] == 0).all()
    assert mine.grad[1, 2].abs().max() > 0


def test_the_loss_and_its_gradient_are_those_of_logits_without_the_last_position() -> None:
    inputs = batch_of(some_blocks([9, 4, 2])).inputs
    mine, reference = some_logits(1).requires_grad_(), some_logits(1).requires_grad_()
    loss = nll_of(mine, some_blocks([9, 4, 2]))
    targets = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)
    expected = torch.nn.functional.cross_entropy(
        reference[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad, reference.grad)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_likely_words_bound_the_divergence_and_reach_it_with_all_words(temperature: float) -> None:
    student, teacher = some_logits(1), some_logits(2)
    whole = float(distillation_loss(student, teacher, TARGETS, temperature))
    bounds = [
        float(likely_words_loss(student, likely_words(teacher, count, temperature), TARGETS, temperature))
        for count in range(1, WORDS + 1)
    ]
    assert all(bound <= whole * (1 + 1e-5) for bound in bounds)
    assert bounds[0] < bounds[4] < whole
    assert bounds[-1] == pytest.approx(whole, rel=1e-5)
    same = likely_words_loss(teacher, likely_words(teacher, 3, temperature), TARGETS, temperature)
    assert float(same) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("count", [1, 3, WORDS])
def test_likely_words_and_their_gradient_are_a_sum_in_float64(count: int) -> None:
    """Beside outcomes added up word by word; in one token a word is so likely that float32 has nothing left beside."""
    logits, teacher, temperature = some_logits(1), some_logits(2), 2.0
    logits[0, 0, 3] += 60
    mine = logits.clone().requires_grad_()
    loss = likely_words_loss(mine, likely_words(teacher, count, temperature), TARGETS, temperature)
    reference = logits.double().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for row, position in itertools.product(range(3), range(TOKENS - 1)):
        if MASK[row, position + 1]:
            p = (teacher[row, position].double() / temperature).softmax(-1)
            q = (reference[row, position] / temperature).softmax(-1)
            first, others = torch.sort(p, descending=True).indices.split([count, WORDS - count])
            for group in [*first.split(1), *([others] if len(others) else [])]:
                expected = expected + p[group].sum() * (p[group].sum() / q[group].sum()).log() * temperature**2
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-3, atol=1e-5)


def test_hidden_states_are_compared_token_by_token_relative_to_the_teachers() -> None:
    draw = torch.Generator().manual_seed(3)
    teacher = [torch.randn(3, TOKENS, 5, generator=draw) * scale for scale in (1, 100)]
    student = [state + 0.1 * torch.randn(state.shape, generator=draw) for state in teacher]
    student[0][MASK.roll(-1, 1) == 0] = 1e6  # after the last token that predicts one, and in the padding
    expected = sum(
        float((student[layer][row, token] - teacher[layer][row, token]).norm() ** 2
              / teacher[layer][row, token].norm() ** 2)
        for layer in range(2) for row in range(3) for token in range(TOKENS - 1) if MASK[row, token + 1]
    ) / 2  # fmt: skip
    student[0][:, -1] = 1e6
    assert float(hidden_loss(student, teacher, PREDICTING)) == pytest.approx(expected, rel=1e-4)
    assert float(hidden_loss(teacher, teacher, PREDICTING)) == 0


def test_losses_are_mixed_by_their_shares() -> None:
    batch = batch_of(some_blocks([9, 4, 2]))
    student, teacher = some_logits(1), some_logits(2)
    states = [torch.randn(3, TOKENS, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    nll = summed_nll(student, batch.targets)
    assert torch.equal(mixed_loss(student, [], None, batch, None), nll)
    config = DistillationConfig(weight=0.3, temperature=2.0, hidden_weight=0.2)
    mixed = mixed_loss(student, states[:1], Answer(teacher, None, states[1:]), batch, config)
    distance = distillation_loss(student, teacher, batch.targets, 2.0)
    apart = hidden_loss(states[:1], states[1:], batch.state_weights_BT)
    assert float(mixed) == pytest.approx(float(0.5 * nll + 0.3 * distance + 0.2 * apart), rel=1e-6)
    likely = likely_words(teacher, 4, 2.0)
    few = mixed_loss(student, [], Answer(None, likely, []), batch, DistillationConfig(weight=1, temperature=2.0))
    assert float(few) == pytest.approx(float(likely_words_loss(student, likely, TARGETS, 2.0)), rel=1e-6)


@settings(max_examples=60)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**31), st.integers(1, 4))
def test_every_epoch_is_a_permutation_of_its_own(num_blocks: int, batch_size: int, seed: int, epochs: int) -> None:
    order = DataOrder(num_blocks, batch_size, seed)
    steps = -(-num_blocks * epochs // batch_size)
    seen = [row for step in range(steps) for row in order.rows(step)]
    assert all(len(order.rows(step)) == batch_size for step in range(steps))
    for epoch in range(epochs):
        assert sorted(seen[epoch * num_blocks : (epoch + 1) * num_blocks]) == list(range(num_blocks))


def test_epochs_and_seeds_differ() -> None:
    order = DataOrder(50, 50, 3)
    assert order.rows(0) == DataOrder(50, 50, 3).rows(0)
    rows = [order.rows(0), order.rows(1), DataOrder(50, 50, 4).rows(0), list(range(50))]
    assert all(one != other for one, other in itertools.combinations(rows, 2))


@settings(max_examples=80)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 40), st.integers(0, 50))
def test_all_workers_together_see_the_batch_whatever_their_number(
    world_size: int, micro: int, accumulation: int, num_blocks: int, step: int
) -> None:
    order = DataOrder(num_blocks, world_size * micro * accumulation, 5)
    shares = [order.micro_batches(step, rank, world_size, micro) for rank in range(world_size)]
    assert all(len(share) == accumulation and all(len(rows) == micro for rows in share) for share in shares)
    turns = [row for turn in zip(*shares, strict=True) for rows in turn for row in rows]
    assert turns == order.rows(step)  # in the order of turns it is the very same batch
