"""HSIC and CKA against formulas written out a second time, and against what must not change them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpruner_dist.similarity.hsic import cka_matrix, gram, hsic_of_pairs, u_centred, unbiased_hsic

SEEDS = st.integers(0, 2**31)
SIZES = st.integers(4, 12)


def features(seed: int, samples: int, *widths: int) -> list[Tensor]:
    """Features that share a signal, so that their CKA is neither 0 nor 1."""
    draw = torch.Generator().manual_seed(seed)
    signal = torch.randn(samples, 3, generator=draw, dtype=torch.float64)
    made = []
    for width in widths:
        noise = torch.randn(samples, width, generator=draw, dtype=torch.float64)
        made.append(signal @ torch.randn(3, width, generator=draw, dtype=torch.float64) + 0.7 * noise + 2.0)
    return made


def three_terms(k: Tensor, other: Tensor) -> float:
    """Song et al. 2012, equation 5, in loops: k and other lose their diagonals, then three sums."""
    n = len(k)
    a = [[0.0 if i == j else float(k[i, j]) for j in range(n)] for i in range(n)]
    b = [[0.0 if i == j else float(other[i, j]) for j in range(n)] for i in range(n)]
    pairs = list(itertools.product(range(n), repeat=2))
    trace = sum(a[i][j] * b[j][i] for i, j in pairs)
    sums = sum(a[i][j] for i, j in pairs) * sum(b[i][j] for i, j in pairs) / ((n - 1) * (n - 2))
    crossed = sum(a[i][j] * b[j][m] for i, j in pairs for m in range(n)) * 2 / (n - 2)
    return (trace + sums - crossed) / (n * (n - 3))


@settings(max_examples=40)
@given(SEEDS, SIZES)
def test_hsic_is_the_three_terms_of_song(seed: int, samples: int) -> None:
    x, y = features(seed, samples, 5, 3)
    expected = three_terms(gram(x), gram(y))
    scale = max(1.0, abs(three_terms(gram(x), gram(x))))
    assert float(unbiased_hsic(gram(x), gram(y))) == pytest.approx(expected, abs=1e-10 * scale, rel=1e-9)


@settings(max_examples=40)
@given(SEEDS, SIZES)
def test_hsic_is_the_product_of_u_centred_matrices(seed: int, samples: int) -> None:
    x, y = features(seed, samples, 4, 6)
    k, other = gram(x), gram(y)
    expected = float((u_centred(k) * u_centred(other)).sum()) / (samples * (samples - 3))
    assert float(unbiased_hsic(k, other)) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert u_centred(k).sum(0).abs().max() < 1e-9 * k.abs().max()  # what U-centring means: every row sums to nothing
    assert (u_centred(k).diagonal() == 0).all()


def test_hsic_of_all_pairs_is_that_of_each_pair() -> None:
    grams = torch.stack([gram(x) for x in features(1, 9, 2, 3, 4)])
    every = hsic_of_pairs(grams)
    for i, j in itertools.product(range(3), repeat=2):
        assert float(every[i, j]) == pytest.approx(three_terms(grams[i], grams[j]), rel=1e-9)
    assert every.dtype == torch.float64
    assert torch.equal(every, every.T)


def test_u_centring_leaves_its_argument_alone() -> None:
    k = gram(features(2, 6, 3)[0])
    before = k.clone()
    u_centred(k)
    assert torch.equal(k, before)


def test_hsic_of_independent_features_is_zero_on_average() -> None:
    draw = torch.Generator().manual_seed(7)
    found = []
    for _ in range(2000):
        x, y = torch.randn(2, 6, 3, generator=draw, dtype=torch.float64)
        found.append(float(unbiased_hsic(gram(x), gram(y))))
    values = torch.tensor(found, dtype=torch.float64)
    standard_error = float(values.std()) / len(found) ** 0.5
    assert abs(float(values.mean())) < 4 * standard_error
    assert float(values.min()) < 0 < float(values.max())


def test_gram_of_low_precision_is_float32_and_of_float64_stays() -> None:
    x = features(3, 5, 300)[0]
    assert gram(x.bfloat16()).dtype == torch.float32
    assert torch.equal(gram(x.bfloat16()), x.bfloat16().float() @ x.bfloat16().float().T)
    assert gram(x).dtype == torch.float64


@settings(max_examples=40)
@given(SEEDS, SIZES, st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_cka_does_not_change_when_features_are_turned_scaled_moved(
    seed: int, samples: int, factor: float, shift: float
) -> None:
    x, y = features(seed, samples, 5, 4)
    before = cka_matrix([x, y])
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64))
    after = cka_matrix([(x @ turn) * factor + shift, y])
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


@settings(max_examples=40)
@given(SEEDS, SIZES)
def test_cka_does_not_change_with_the_order_of_samples_and_follows_that_of_layers(seed: int, samples: int) -> None:
    layers = features(seed, samples, 3, 4, 5)
    before = cka_matrix(layers)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(cka_matrix([layer[order] for layer in layers]), before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cka_matrix(layers[::-1]), before.flip(0, 1), rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(SEEDS, SIZES)
def test_cka_is_symmetric_with_unit_diagonal(seed: int, samples: int) -> None:
    cka = cka_matrix(features(seed, samples, 3, 4, 5))
    assert cka.dtype == torch.float64
    assert torch.equal(cka, cka.T)
    assert (cka.diagonal() == 1).all()


def test_cka_tells_equal_from_unrelated() -> None:
    x, y = features(5, 400, 6, 6)
    other = torch.randn(400, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    cka = cka_matrix([x, 3 * x + 1, y, other])
    assert float(cka[0, 1]) == pytest.approx(1, abs=1e-12)
    assert 0.3 < float(cka[0, 2]) < 0.99
    assert abs(float(cka[0, 3])) < 0.05


def test_cka_keeps_its_digits_far_from_the_origin() -> None:
    x, y = features(4, 30, 4, 4)
    torch.testing.assert_close(cka_matrix([x + 1e8, y]), cka_matrix([x, y]), rtol=1e-6, atol=1e-6)


def test_cka_changes_when_features_are_stretched() -> None:
    """The invariances above are not those of a constant."""
    x, y = features(8, 30, 4, 4)
    stretched = x * torch.tensor([100.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert abs(float(cka_matrix([x, y])[0, 1] - cka_matrix([stretched, y])[0, 1])) > 1e-3


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_fewer_than_four_samples_are_refused(samples: int) -> None:
    x, y = (torch.arange(samples * 2.0).view(samples, 2) ** 2 + shift for shift in (0, 1))
    with pytest.raises(ValueError, match=f"needs 4 samples, got {samples}"):
        cka_matrix([x, y])
    with pytest.raises(ValueError, match=f"needs 4 samples, got {samples}"):
        unbiased_hsic(gram(x), gram(y))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_features_that_are_not_finite_are_refused_by_number(value: float) -> None:
    x, y = features(9, 8, 3, 3)
    y[5, 1] = value
    with pytest.raises(ValueError, match="features 1 are not finite"):
        cka_matrix([x, y])


def test_constant_features_are_refused_by_number() -> None:
    x = features(9, 8, 3)[0]
    with pytest.raises(ValueError, match="features 1 are constant"):
        cka_matrix([x, x[:1].expand(8, 3)])


def test_unequal_samples_are_refused_with_their_numbers() -> None:
    x = features(9, 8, 3)[0]
    with pytest.raises(ValueError, match=r"same samples, got \[8, 7\]"):
        cka_matrix([x, x[:7]])
    with pytest.raises(ValueError, match="one shape"):
        unbiased_hsic(gram(x), gram(x[:7]))


def test_features_whose_hsic_is_not_positive_are_refused() -> None:
    """One sample differs from all others: the unbiased estimate of their variance is then zero."""
    lonely = torch.zeros(6, 2, dtype=torch.float64)
    lonely[0, 0] = 6.0
    with pytest.raises(ValueError, match=r"features 1 .*more samples needed"):
        cka_matrix([features(9, 6, 3)[0], lonely])
