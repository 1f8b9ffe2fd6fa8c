"""Every estimator against a dense reference in float64, and against the identities that it must satisfy.

Shape suffixes: N samples, D features, L layers, B batches.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.similarity.estimators import FEATURE_LIMIT, make_estimator
from mpruner_dist.similarity.finalise import cka, null_cka, updates_cka
from mpruner_dist.similarity.hsic import (
    cka_matrix,
    h_centred,
    pack,
    permuted_places,
    products_with_permuted,
    u_centred,
    unpack,
)
from mpruner_dist.similarity.sums import BatchSums, Floats, Terms

LAYERS, SAMPLES, WIDTH, BATCHES, SEQUENCES = 5, 48, 12, 6, 3
ALL = ["debiased", "biased", "sentence", "feature"]


def features(batch: int, *, layers: int = LAYERS, samples: int = SAMPLES, width: int = WIDTH) -> list[Tensor]:
    """Related layers [N, D], float32: each mixes the one before with noise of its own."""
    draw = torch.Generator().manual_seed(batch)
    mixing = torch.Generator().manual_seed(99)
    made = [torch.randn(samples, width, generator=draw) + 1.0]
    for _ in range(layers - 1):
        turn = torch.randn(width, width, generator=mixing) / width**0.5
        made.append(made[-1] @ turn + 0.5 * torch.randn(samples, width, generator=draw))
    return made


def groups(samples: int = SAMPLES) -> Tensor:
    return torch.arange(samples) % SEQUENCES


def terms_of(name: str, layers: list[Tensor], groups_N: Tensor, chosen: Tensor | None = None) -> Terms:
    estimator = make_estimator(name, len(layers))
    for features_ND in layers:
        estimator.keep(features_ND[None])
    chosen = torch.arange(len(layers[0])) if chosen is None else chosen
    orders = torch.stack([
        torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed)) for seed in range(2)
    ])  # fmt: skip
    terms = estimator.terms(chosen, groups_N[chosen], orders)
    return {f"states.{name}": value.numpy() for name, value in terms.items()}


def sums_of(name: str, batches: int = BATCHES, **sizes: int) -> BatchSums:
    sums = BatchSums()
    for batch in range(batches):
        sums.update(batch, terms_of(name, features(batch, **sizes), groups(sizes.get("samples", SAMPLES))))
    return sums


def hsic_song(k: Floats, other: Floats) -> float:
    """Song et al. 2012, equation 5, term by term."""
    n = len(k)
    k, other = k - np.diag(np.diag(k)), other - np.diag(np.diag(other))
    one = np.ones(n)
    three = np.trace(k @ other) + one @ k @ one * (one @ other @ one) / ((n - 1) * (n - 2))
    return float((three - 2 / (n - 2) * (one @ k @ other @ one)) / (n * (n - 3)))


def hsic_gretton(k: Floats, other: Floats) -> float:
    """tr(K H L H) / (n - 1)^2."""
    n = len(k)
    h = np.eye(n) - 1 / n
    return float(np.trace(k @ h @ other @ h) / (n - 1) ** 2)


def dense(hsic: Any, batches: list[list[Floats]]) -> Floats:
    """Sums of HSIC over batches, then the ratio, by loops in float64."""
    total = np.zeros((LAYERS, LAYERS))
    for layers in batches:
        grams = [x @ x.T for x in layers]
        total += [[hsic(k, other) for other in grams] for k in grams]
    return np.asarray(total / np.sqrt(np.outer(np.diag(total), np.diag(total))))


def as_double(layers: list[Tensor]) -> list[Floats]:
    return [x.double().numpy() for x in layers]


@pytest.mark.parametrize(("name", "hsic"), [("debiased", hsic_song), ("biased", hsic_gretton)])
def test_minibatch_hsic_is_that_of_a_dense_computation(name: str, hsic: Any) -> None:
    reference = dense(hsic, [as_double(features(batch)) for batch in range(BATCHES)])
    measured = cka(sums_of(name).total())
    assert np.abs(measured - reference).max() < 1e-6
    assert np.ptp(reference[np.triu_indices(LAYERS, 1)]) > 0.3  # the layers do differ


def test_the_terms_themselves_are_hsic() -> None:
    grams = [x @ x.T for x in as_double(features(0))]
    for name, hsic in (("debiased", hsic_song), ("biased", hsic_gretton)):
        expected = [[hsic(k, other) for other in grams] for k in grams]
        np.testing.assert_allclose(terms_of(name, features(0), groups())["states.hsic"], expected, rtol=1e-5)


def test_sentence_is_the_mean_of_biased_ratios_within_each_sequence() -> None:
    ratios = []
    for batch in range(BATCHES):
        for group in range(SEQUENCES):
            part = [x[groups().numpy() == group] for x in as_double(features(batch))]
            ratios.append(dense(hsic_gretton, [part]))
    assert np.abs(cka(sums_of("sentence").total()) - np.mean(ratios, 0)).max() < 1e-6


def test_sentence_skips_a_sequence_in_which_a_layer_is_constant() -> None:
    layers = features(0)
    layers[2][groups() == 1] = 1.0
    terms = terms_of("sentence", layers, groups())
    assert terms["states.count"][0, 1] == SEQUENCES
    assert terms["states.count"][2, 1] == SEQUENCES - 1
    layers[2][:] = 1.0
    with pytest.raises(StageFailure, match="layer 2 is constant within every sequence"):
        cka(terms_of("sentence", layers, groups()))


def test_feature_is_the_biased_cka_of_all_samples_at_once() -> None:
    """Exactly additive: the division into batches does not show, as it does for the Gram estimators."""
    whole = [np.concatenate([as_double(features(batch))[layer] for batch in range(BATCHES)]) for layer in range(LAYERS)]
    reference = dense(hsic_gretton, [whole])
    assert np.abs(cka(sums_of("feature").total()) - reference).max() < 1e-12
    assert np.abs(cka(sums_of("biased").total()) - reference).max() > 1e-3


def test_feature_refuses_a_wide_model_with_its_size() -> None:
    estimator = make_estimator("feature", 4)
    with pytest.raises(UserError, match=r"4 layers x 600 features, 0\.046 GB a batch.*use estimator debiased"):
        estimator.keep(torch.zeros(1, 4, 600))
    assert 4 * 600 > FEATURE_LIMIT >= 4 * 512


@pytest.mark.parametrize("name", ALL)
def test_samples_left_out_are_as_if_they_had_not_been_there(name: str) -> None:
    chosen = torch.tensor([n for n in range(SAMPLES) if n % 5])
    left = terms_of(name, features(0), groups(), chosen)
    alone = terms_of(name, [x[chosen] for x in features(0)], groups()[chosen])
    for term, value in alone.items():
        np.testing.assert_allclose(left[term], value, rtol=1e-4, atol=1e-6 * np.abs(value).max(), err_msg=term)


@pytest.mark.parametrize("name", ALL)
def test_neither_scale_shift_nor_rotation_changes_cka(name: str) -> None:
    layers = features(0)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5))).Q
    moved = [*layers[:2], 3.0 * layers[2] @ turn + 2.0, *layers[3:]]
    expected, got = (cka(terms_of(name, some, groups())) for some in (layers, moved))
    assert np.abs(expected - got).max() < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_a_turned_layer_is_the_same_and_the_diagonal_is_one(name: str) -> None:
    layers = features(0)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5))).Q
    layers[3] = 0.1 * layers[1] @ turn
    matrix = cka(terms_of(name, layers, groups()))
    assert matrix[1, 3] == pytest.approx(1.0, abs=1e-5)
    assert np.diagonal(matrix) == pytest.approx(np.ones(LAYERS), abs=1e-12)
    assert np.array_equal(matrix, matrix.T)


def test_only_the_debiased_estimator_scores_unrelated_features_zero() -> None:
    """Biased minibatch CKA of unrelated features of n samples and d features is about d / (d + n)."""
    width = 4 * SAMPLES
    scores = {}
    for name in ("debiased", "biased"):
        sums = BatchSums()
        for batch in range(24):
            draw = torch.Generator().manual_seed(batch)
            layers = [torch.randn(SAMPLES, width, generator=draw) for _ in range(2)]
            sums.update(batch, terms_of(name, layers, groups()))
        scores[name] = float(cka(sums.total())[0, 1])
    assert abs(scores["debiased"]) < 0.03
    assert scores["biased"] == pytest.approx(width / (width + SAMPLES), abs=0.03)


@pytest.mark.parametrize("name", ALL)
def test_the_null_is_what_shuffled_samples_score(name: str) -> None:
    """One side of each pair shuffled by hand, then measured as if the layers were others."""
    layers = features(0)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
    if name == "sentence":  # it shuffles within a sequence
        for group in range(SEQUENCES):
            inside = (groups() == group).nonzero().squeeze(1)
            order[inside] = inside[order[inside].argsort()]
    null = null_cka(terms_of(name, layers, groups()))[0]
    both = cka(terms_of(name, [*layers, *[x[order] for x in layers]], groups()))
    expected = both[:LAYERS, LAYERS:]
    if name == "sentence":
        # which of the equally random orders is taken within a sequence is not fixed; their mean level is
        assert np.abs(null.mean() - expected.mean()) < 0.1
    else:
        assert np.abs(null - expected).max() < 1e-5
    assert np.abs(null).max() < 0.75 < cka(terms_of(name, layers, groups()))[0, 1] + 0.2


def test_an_idle_block_has_updates_without_cka_and_hides_no_other() -> None:
    layers = features(0)
    layers[2] = torch.zeros(SAMPLES, WIDTH)
    for name in ("debiased", "biased", "feature", "sentence"):
        terms = {key.replace("states", "updates"): value for key, value in terms_of(name, layers, groups()).items()}
        matrix = updates_cka(terms)
        known = np.delete(np.delete(matrix, 2, 0), 2, 1)
        assert np.isnan(matrix[2]).all()
        assert np.isnan(matrix[:, 2]).all()
        others = [x for layer, x in enumerate(layers) if layer != 2]
        assert np.abs(known - cka(terms_of(name, others, groups()))).max() < 1e-6  # sizes round differently


def test_a_self_hsic_that_is_not_positive_names_its_layer() -> None:
    terms = terms_of("debiased", features(0), groups())
    for value in (0.0, -1e-9, float("nan")):
        terms["states.hsic"][2, 2] = value
        with pytest.raises(StageFailure, match=r"the HSIC of layer 2 with itself is .*collect\.samples"):
            cka(terms)


@settings(max_examples=40)
@given(st.integers(4, 30), st.integers(1, 12), st.integers(0, 2**31))
def test_triangles_hold_the_whole_matrix(n: int, width: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, width, generator=draw, dtype=torch.float64) for _ in range(2))
    k, other = x @ x.T, y @ y.T
    assert pack(k) @ pack(other) == pytest.approx(float((k * other).sum()), rel=1e-10)
    torch.testing.assert_close(unpack(pack(k), n), k)
    order = torch.randperm(n, generator=draw)
    torch.testing.assert_close(unpack(pack(k)[permuted_places(order)], n), k[order][:, order])
    product = products_with_permuted(torch.stack([pack(k), pack(other)]), order)
    assert product[0, 1] == pytest.approx(float((k * other[order][:, order]).sum()), rel=1e-9, abs=1e-9)


@settings(max_examples=40)
@given(st.integers(6, 30), st.integers(0, 2**31))
def test_centring_is_a_projection_also_for_parts(n: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=draw, dtype=torch.float64)
    part = torch.randperm(n, generator=draw)[:5]
    for centred in (u_centred, h_centred):
        whole = centred(x @ x.T)
        torch.testing.assert_close(centred(whole[part][:, part]), centred((x @ x.T)[part][:, part]))
        torch.testing.assert_close(centred(whole), whole)


def test_the_streamed_and_the_plain_computation_agree() -> None:
    layers = features(0)
    assert np.abs(cka(terms_of("debiased", layers, groups())) - cka_matrix(layers).numpy()).max() < 1e-6
