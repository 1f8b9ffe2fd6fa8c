"""Which tokens are compared, and what hooks on real blocks make of them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpruner_dist.config import CollectConfig
from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.similarity.hsic import hsic_of_pairs
from mpruner_dist.similarity.samples import LayerTap, draw_candidates

WIDTH, LAYERS, SEQUENCES, TOKENS = 6, 4, 3, 20


def config(**changes: Any) -> CollectConfig:
    return CollectConfig(**{"samples": 16, "skip_tokens": 1, "outlier_norm": 10.0, "normalize": True} | changes)


class Block(torch.nn.Module):
    """A residual block that may spoil one token, and may return a tuple as older families do."""

    def __init__(self, in_tuple: bool) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self.in_tuple = in_tuple
        self.spoil: tuple[int, float] | None = None

    def forward(self, hidden: Tensor) -> Any:
        hidden = hidden + self.linear(hidden).tanh()
        if self.spoil is not None:
            token, factor = self.spoil
            hidden = hidden.clone()
            hidden.view(-1, WIDTH)[token] *= factor
        return (hidden, "cache") if self.in_tuple else hidden


class Model(torch.nn.Module):
    def __init__(self, in_tuple: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Block(in_tuple) for _ in range(LAYERS))

    def forward(self, hidden: Tensor) -> list[Tensor]:
        outputs = []
        for layer in self.layers:
            made = layer(hidden)
            outputs.append(made[0] if isinstance(made, tuple) else made)
            # what a block spoils stays its own: the next one goes on from clean states
            hidden = outputs[-1] if layer.spoil is None else hidden
        return outputs


def inputs() -> Tensor:
    return torch.randn(SEQUENCES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))


def tapped(model: Model, settings: CollectConfig, candidates: Tensor) -> tuple[Tensor, int]:
    tap = LayerTap(model.layers, settings)
    tap.begin(5, candidates)
    with torch.no_grad():
        model(inputs())
    tap.close()
    return tap.hsic()


def by_hand(model: Model, tokens: Tensor, normalize: bool) -> Tensor:
    """HSIC [L, L] of these tokens' vectors, selected and normalised without any hook."""
    grams = []
    with torch.no_grad():
        for output in model(inputs()):
            vectors = output.reshape(-1, WIDTH)[tokens]
            if normalize:
                vectors = vectors / (vectors**2).mean(1, keepdim=True).sqrt()
            grams.append(vectors @ vectors.T)
    return hsic_of_pairs(torch.stack(grams))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(0, 1000), st.integers(0, 4), st.integers(4, 40))
def test_no_padding_no_first_tokens_no_token_twice(seed: int, batch: int, skip: int, samples: int) -> None:
    lengths = torch.randint(skip + 15, 41, (4, 1), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(40)[None] < lengths).long()
    drawn = draw_candidates(mask, config(samples=samples, skip_tokens=skip), batch)
    rows, columns = drawn // 40, drawn % 40
    assert (columns >= skip).all()
    assert mask[rows, columns].all()
    eligible = int((lengths - skip).sum())
    assert len(set(drawn.tolist())) == len(drawn) == min(samples + samples // 4, eligible)


def test_the_draw_depends_on_seed_and_batch_alone() -> None:
    mask = torch.ones(4, 30, dtype=torch.long)
    first = draw_candidates(mask, config(), 7)
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(draw_candidates(mask, config(), 7), first)
    assert not torch.equal(draw_candidates(mask, config(), 8), first)
    assert not torch.equal(draw_candidates(mask, config(seed=1), 7), first)
    assert mask.all()  # the mask itself is not touched


def test_too_few_tokens_are_told_with_both_numbers() -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    assert len(draw_candidates(mask, config(), 3)) == 16
    mask[0, 8] = 0
    with pytest.raises(UserError, match=r"calibration batch 3 has 15 tokens .* collect\.samples is 16.*lower it"):
        draw_candidates(mask, config(), 3)


@pytest.mark.parametrize("in_tuple", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("normalize", [False, True])
def test_hsic_is_that_of_the_selected_vectors(in_tuple: bool, normalize: bool) -> None:
    model = Model(in_tuple)
    candidates = draw_candidates(torch.ones(SEQUENCES, TOKENS), config(), 5)
    assert len(candidates) == 20
    hsic, count = tapped(model, config(normalize=normalize), candidates)
    assert count == 16
    assert hsic.dtype == torch.float64
    torch.testing.assert_close(hsic, by_hand(model, candidates[:16], normalize), rtol=1e-4, atol=1e-6)
    other = by_hand(model, candidates[:16], not normalize)
    assert (hsic - other).abs().max() > 0.01 * other.abs().max()


def test_an_outlier_in_one_layer_is_left_out_of_all() -> None:
    model = Model()
    candidates = draw_candidates(torch.ones(SEQUENCES, TOKENS), config(), 5)
    model.layers[2].spoil = (int(candidates[4]), 1000.0)
    hsic, count = tapped(model, config(normalize=False), candidates)
    replaced = torch.cat([candidates[:4], candidates[5:17]])  # the spare next in line takes its place
    assert count == 16
    torch.testing.assert_close(hsic, by_hand(model, replaced, False), rtol=1e-4, atol=1e-6)
    with_it, _ = tapped(model, config(normalize=False, outlier_norm=None), candidates)
    assert with_it[2, 2] > 1000 * hsic[2, 2]
    torch.testing.assert_close(with_it, by_hand(model, candidates[:16], False), rtol=1e-4, atol=1e-2)


def test_more_outliers_than_spares_lower_the_number_of_samples() -> None:
    model = Model()
    candidates = torch.arange(1, 6)
    for layer, token in enumerate([2, 4]):
        model.layers[layer].spoil = (token, 1000.0)
    tap = LayerTap(model.layers, config())
    tap.begin(11, candidates)
    model(inputs())
    with pytest.raises(StageFailure, match=r"batch 11: 3 tokens are left after the norm outliers, 4 needed"):
        tap.hsic()
    hsic, count = tapped(model, config(), torch.arange(1, 9))
    assert count == 6
    torch.testing.assert_close(hsic, by_hand(model, torch.tensor([1, 3, 5, 6, 7, 8]), True), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [0, 3])
def test_activations_that_are_not_finite_name_layer_and_batch(layer: int, value: float) -> None:
    model = Model()
    model.layers[layer].spoil = (7, value)
    with pytest.raises(StageFailure, match=rf"batch 5: 10\.0% of the sampled activations of layer {layer} are not fin"):
        tapped(model, config(), torch.arange(10))
    model = Model()
    model.layers[layer].spoil = (7, value)
    tapped(model, config(), torch.arange(8, 18))  # a token that was not drawn does no harm


def test_a_pass_that_missed_blocks_or_ran_twice_is_refused() -> None:
    model = Model()
    tap = LayerTap(model.layers, config())
    tap.begin(5, torch.arange(10))
    model.layers[0](inputs())
    with pytest.raises(StageFailure, match="batch 5: 1 blocks ran, the model has 4"):
        tap.hsic()
    model(inputs())
    with pytest.raises(StageFailure, match="batch 5: 5 blocks ran, the model has 4"):
        tap.hsic()
    tap.begin(6, torch.arange(10))  # begins anew
    model(inputs())
    assert tap.hsic()[1] == 10


def test_without_candidates_nothing_is_kept_and_close_removes_the_hooks() -> None:
    model = Model()
    tap = LayerTap(model.layers, config())
    model(inputs())
    assert tap.grams == []
    tap.begin(5, torch.arange(10))
    tap.close()
    model(inputs())
    assert tap.grams == []
    assert all(not block._forward_hooks for block in model.layers)


def test_low_precision_states_are_compared_in_float32() -> None:
    model = Model().bfloat16()
    tap = LayerTap(model.layers, config())
    tap.begin(5, torch.arange(10))
    with torch.no_grad():
        model(inputs().bfloat16())
    assert all(gram.dtype == torch.float32 for gram in tap.grams)
    assert torch.isfinite(tap.hsic()[0]).all()
