"""Which samples of a batch are compared, whatever a sample is."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpruner_dist.config import CollectConfig
from mpruner_dist.errors import UserError
from mpruner_dist.similarity.samples import PERMUTATIONS, draw_samples


def config(**changes: Any) -> CollectConfig:
    return CollectConfig(**{"samples": 16, "skip_tokens": 1} | changes)


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(0, 1000), st.integers(0, 4), st.integers(4, 40))
def test_no_padding_no_first_tokens_no_token_twice(seed: int, batch: int, skip: int, samples: int) -> None:
    lengths = torch.randint(skip + 15, 41, (4, 1), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(40)[None] < lengths).long()
    drawn = draw_samples(mask, config(samples=samples, skip_tokens=skip), batch)
    rows, columns = drawn.positions_N // 40, drawn.positions_N % 40
    assert (columns >= skip).all()
    assert mask[rows, columns].all()
    assert torch.equal(drawn.groups_N, rows)
    assert len(set(drawn.positions_N.tolist())) == len(drawn.positions_N) == samples


def test_the_draw_depends_on_seed_and_batch_alone() -> None:
    mask = torch.ones(4, 30, dtype=torch.long)
    first = draw_samples(mask, config(), 7)
    torch.manual_seed(99)  # the global generator has no say
    again = draw_samples(mask, config(), 7)
    assert torch.equal(again.positions_N, first.positions_N)
    assert torch.equal(again.orders(16), first.orders(16))
    for other in (draw_samples(mask, config(), 8), draw_samples(mask, config(seed=1), 7)):
        assert not torch.equal(other.positions_N, first.positions_N)
        assert not torch.equal(other.orders(16), first.orders(16))
    assert mask.all()  # the mask itself is not touched


def test_the_null_has_several_permutations() -> None:
    orders = draw_samples(torch.ones(4, 30), config(), 7).orders(16)
    assert orders.shape == (PERMUTATIONS, 16)
    assert all(sorted(order) == list(range(16)) for order in orders.tolist())
    assert len({tuple(order) for order in orders.tolist()}) == PERMUTATIONS


def test_too_few_tokens_are_told_with_both_numbers() -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    assert len(draw_samples(mask, config(), 3).positions_N) == 16
    mask[0, 8] = 0
    with pytest.raises(
        UserError, match=r"calibration batch 3 has 15 token samples .*, 16 are needed: lower collect\.s"
    ):
        draw_samples(mask, config(), 3)


def test_too_few_sequences_are_told() -> None:
    mask = torch.ones(5, 9, dtype=torch.long)
    mask[3:, 1:] = 0  # nothing but a first token
    assert len(draw_samples(torch.ones(5, 9), config(unit="sequence"), 0).positions_N) == 5
    with pytest.raises(UserError, match=r"calibration batch 0 has 3 sequence samples .*, 4 are needed"):
        draw_samples(mask, config(unit="sequence"), 0)


def test_a_token_is_its_vector() -> None:
    hidden = torch.randn(3, 20, 6)
    drawn = draw_samples(torch.ones(3, 20), config(), 0)
    rows, columns = drawn.positions_N // 20, drawn.positions_N % 20
    assert torch.equal(drawn.take(hidden), hidden[rows, columns])


def test_a_sequence_is_the_mean_of_its_eligible_tokens() -> None:
    hidden = torch.randn(4, 6, 3)
    mask = torch.ones(4, 6)
    mask[2, 4:] = 0
    drawn = draw_samples(mask, config(unit="sequence"), 0)
    expected = {row: hidden[row, 1 : 4 if row == 2 else 6].mean(0) for row in range(4)}
    for row, vector in zip(drawn.positions_N.tolist(), drawn.take(hidden), strict=True):
        torch.testing.assert_close(vector, expected[row])


def test_an_image_is_all_its_features() -> None:
    hidden = torch.randn(4, 3, 5, 7)  # as convolutions make it
    images = draw_samples(torch.ones(4, 35), config(unit="image", skip_tokens=0), 0)
    assert images.take(hidden).shape == (4, 105)
    for row, vector in zip(images.positions_N.tolist(), images.take(hidden), strict=True):
        assert torch.equal(vector.view(35, 3), hidden[row].flatten(1).T)
    assert torch.equal(images.groups_N, images.positions_N)
