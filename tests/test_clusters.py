"""Clusters of layers against the published rule and against trying everything."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpruner_dist.planning.clusters import (
    Clusters,
    anchor_clusters,
    best_partition,
    open_decisions,
    removed_by_stride,
)

Floats = npt.NDArray[np.float64]


def random_cka(seed: int, depth: int) -> Floats:
    half = np.random.default_rng(seed).uniform(0, 1, (depth, depth))
    cka = (half + half.T) / 2
    np.fill_diagonal(cka, 1.0)
    return cka


def loss(cka: Floats, clusters: Clusters) -> float:
    return sum(1 - cka[cluster[0], layer] for cluster in clusters for layer in cluster[1:])


def all_partitions(depth: int, keep: int) -> list[Clusters]:
    found = []
    for cuts in itertools.combinations(range(1, depth), keep - 1):
        edges = [0, *cuts, depth]
        found.append([list(range(a, b)) for a, b in itertools.pairwise(edges)])
    return found


# Neighbours are alike all along, but layer 2 is no longer like layer 0.
DRIFT = np.array(
    [
        [1.00, 0.99, 0.95, 0.90],
        [0.99, 1.00, 0.99, 0.95],
        [0.95, 0.99, 1.00, 0.99],
        [0.90, 0.95, 0.99, 1.00],
    ]
)


def test_a_cluster_is_measured_from_its_anchor_not_along_a_chain() -> None:
    assert anchor_clusters(DRIFT, 0.98) == [[0, 1], [2, 3]]  # a chain would be [[0, 1, 2, 3]]


def test_a_cluster_ends_at_the_first_layer_that_is_unlike_its_anchor() -> None:
    cka = np.full((5, 5), 0.99)
    cka[0, 2] = cka[2, 0] = 0.5
    cka[2, 4] = cka[4, 2] = 0.5
    assert anchor_clusters(cka, 0.98) == [[0, 1], [2, 3], [4]]  # layer 3 is like layer 0, and yet not with it


def test_the_threshold_itself_is_similar_enough() -> None:
    assert anchor_clusters(DRIFT, 0.99) == [[0, 1], [2, 3]]
    assert anchor_clusters(DRIFT, 0.9901) == [[0], [1], [2], [3]]
    assert anchor_clusters(DRIFT, 0.90) == [[0, 1, 2, 3]]
    assert anchor_clusters(np.ones((1, 1)), 0.5) == [[0]]


@settings(max_examples=100)
@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(0, 1))
def test_anchor_clusters_are_consecutive_alike_and_as_long_as_they_can_be(
    seed: int, depth: int, threshold: float
) -> None:
    cka = random_cka(seed, depth)
    clusters = anchor_clusters(cka, threshold)
    assert [layer for cluster in clusters for layer in cluster] == list(range(depth))
    for cluster, following in itertools.pairwise([*clusters, [depth]]):
        assert all(cka[cluster[0], layer] >= threshold for layer in cluster)
        assert following == [depth] or cka[cluster[0], following[0]] < threshold


@pytest.mark.parametrize(
    ("stride", "removed"),
    [(1, [1, 2, 3, 4, 5, 8, 9]), (2, [1, 3, 5, 8]), (3, [1, 4, 8])],
)
def test_strides_take_every_such_layer_after_the_first(stride: int, removed: list[int]) -> None:
    clusters = [[0, 1, 2, 3, 4, 5], [6], [7, 8, 9]]
    assert removed_by_stride(clusters, stride, set()) == removed
    assert removed == [layer for cluster in clusters for layer in cluster[1::stride]]


def test_protected_layers_stay_whatever_the_stride() -> None:
    clusters = [[0, 1, 2, 3], [4, 5]]
    assert removed_by_stride(clusters, 1, {0, 2, 5}) == [1, 3]
    assert removed_by_stride(clusters, 2, {1}) == [3, 5]


@settings(max_examples=150)
@given(st.data(), st.integers(0, 2**31), st.integers(1, 9))
def test_best_partition_is_the_best_of_all(data: st.DataObject, seed: int, depth: int) -> None:
    cka = random_cka(seed, depth)
    protected = data.draw(st.sets(st.integers(0, depth - 1), max_size=4))
    keep = data.draw(st.integers(1, depth))
    allowed = [
        clusters
        for clusters in all_partitions(depth, keep)
        if not protected & {layer for cluster in clusters for layer in cluster[1:]}
    ]
    if not allowed:
        with pytest.raises(ValueError, match=f"keeping {keep} layers would remove one of the protected"):
            best_partition(cka, keep, protected)
        return
    found = best_partition(cka, keep, protected)
    assert found in allowed
    assert loss(cka, found) == pytest.approx(min(loss(cka, clusters) for clusters in allowed), abs=1e-12)


def test_best_partition_sees_what_a_greedy_choice_does_not() -> None:
    """The best single removal is layer 1 into 0; the best two together are 2 and 3 into 1."""
    cka = np.full((4, 4), 0.1)
    for first, layer, value in [(0, 1, 0.96), (1, 2, 0.95), (1, 3, 0.95)]:
        cka[first, layer] = cka[layer, first] = value
    assert best_partition(cka, 3, set()) == [[0, 1], [2], [3]]
    assert best_partition(cka, 2, set()) == [[0], [1, 2, 3]]


@pytest.mark.parametrize("keep", [-1, 0, 5])
def test_an_impossible_number_of_layers_is_refused(keep: int) -> None:
    with pytest.raises(ValueError, match=f"{keep} layers cannot be kept of 4"):
        best_partition(DRIFT, keep, set())


def test_open_decisions_are_the_comparisons_within_the_errors() -> None:
    """With threshold 0.97 the clusters are 0-1 and 2-3: compared were (0, 1), (0, 2) and (2, 3)."""
    assert anchor_clusters(DRIFT, 0.97) == [[0, 1], [2, 3]]

    def still_open(**errors: float) -> list[tuple[int, int]]:
        stderr = np.zeros_like(DRIFT)
        for pair, value in errors.items():
            stderr[int(pair[1]), int(pair[2])] = value
        return open_decisions(DRIFT, stderr, 0.97, 2.0)

    assert still_open() == []
    assert still_open(p01=0.009, p02=0.009, p23=0.009) == []
    assert still_open(p01=0.011) == [(0, 1)]
    assert still_open(p02=0.011, p23=0.011) == [(0, 2), (2, 3)]
    assert still_open(p12=1.0, p03=1.0) == []  # never compared
    assert still_open(p23=float("nan")) == [(2, 3)]
    assert open_decisions(DRIFT, np.full_like(DRIFT, np.inf), 0.97, 2.0) == [(0, 1), (0, 2), (2, 3)]
    assert open_decisions(DRIFT, np.zeros_like(DRIFT), 0.99, 2.0) != []  # exactly at the threshold
