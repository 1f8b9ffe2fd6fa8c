"""Groups of consecutive layers that compute nearly the same thing. L layers; cka_LL is a matrix [L, L]."""

from collections.abc import Callable, Collection, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Clusters = list[list[int]]
APART = -1.0
"""Stands for the similarity of layers of different stacks, which is no threshold."""


def stack_starts(stacks: Sequence[int]) -> set[int]:
    """The first layer of each stack, given how many layers each has."""
    return {sum(stacks[:stack]) for stack in range(len(stacks))}


def apart(cka_LL: Floats, starts: Collection[int]) -> Floats:
    """The same matrix with layers of different stacks as unlike as can be, so that none stands for another."""
    stack_L = np.cumsum([layer in starts for layer in range(len(cka_LL))])
    return np.where(stack_L[:, None] == stack_L, cka_LL, APART)


def anchor_clusters(cka_LL: Floats, threshold: float) -> Clusters:
    """Clusters as MPruner publishes them (arXiv 2408.13482).

    A cluster grows while the next layer is similar enough to its first, the anchor.
    """
    clusters: Clusters = [[0]]
    for layer in range(1, len(cka_LL)):
        if cka_LL[clusters[-1][0], layer] >= threshold:
            clusters[-1].append(layer)
        else:
            clusters.append([layer])
    return clusters


def chain_clusters(cka_LL: Floats, threshold: float) -> Clusters:
    """Single linkage: a cluster grows while the next layer is similar enough to its last."""
    clusters: Clusters = [[0]]
    for layer in range(1, len(cka_LL)):
        if cka_LL[layer - 1, layer] >= threshold:
            clusters[-1].append(layer)
        else:
            clusters.append([layer])
    return clusters


def complete_clusters(cka_LL: Floats, threshold: float) -> Clusters:
    """Complete linkage: the two neighbouring clusters whose least similar layers are most similar become one.

    Again and again, while those are similar enough; so all layers of a cluster are similar to each other.
    """
    clusters: Clusters = [[layer] for layer in range(len(cka_LL))]
    links = [float(link) for link in np.diagonal(cka_LL, 1)]  # of each cluster with the next
    while links and max(links) >= threshold:
        joined = int(np.argmax(links))
        clusters[joined : joined + 2] = [clusters[joined] + clusters[joined + 1]]
        del links[joined]
        for left in (joined - 1, joined):
            if 0 <= left < len(links):
                links[left] = float(cka_LL[np.ix_(clusters[left], clusters[left + 1])].min())
    return clusters


CLUSTERINGS: dict[str, Callable[[Floats, float], Clusters]] = {
    "anchor": anchor_clusters,
    "chain": chain_clusters,
    "complete": complete_clusters,
}


def representative_first(cluster: list[int], cka_LL: Floats, keep: Literal["first", "last", "medoid"]) -> list[int]:
    """A cluster's layers from the one that stands for it on; the medoid has the highest mean CKA with the others."""
    if keep == "medoid":
        medoid = cluster[int(cka_LL[np.ix_(cluster, cluster)].sum(axis=1).argmax())]
        return [medoid, *(layer for layer in cluster if layer != medoid)]
    return cluster if keep == "first" else cluster[::-1]


def clusters_for(
    grow: Callable[[Floats, float], Clusters],
    cka_LL: Floats,
    remove: int,
    protected: set[int],
    keep: Literal["first", "last", "medoid"],
) -> tuple[Clusters, list[int]]:
    """Clusters at the highest threshold that lets at least `remove` layers go, and of those the most alike.

    Returns:
        The clusters, each from the layer that stands for it on, and the layers that go, most alike first.

    Raises:
        ValueError: no threshold lets so many layers go.
    """
    levels = np.unique(cka_LL[np.triu_indices(len(cka_LL), 1)])
    # no two layers are closer than the first threshold: there every layer is a cluster of its own
    for threshold in [np.inf, *levels[levels > APART][::-1]]:
        clusters = [representative_first(cluster, cka_LL, keep) for cluster in grow(cka_LL, threshold)]
        likeness = {
            layer: cka_LL[cluster[0], layer] for cluster in clusters for layer in cluster[1:] if layer not in protected
        }
        if len(likeness) >= remove:
            return clusters, sorted(likeness, key=lambda layer: -likeness[layer])[:remove]
    raise ValueError(f"no threshold makes clusters that let {remove} of {len(cka_LL)} layers go")


def open_decisions(
    cka_LL: Floats, stderr_LL: Floats, threshold: float, standard_errors: float, starts: Collection[int] = ()
) -> list[tuple[int, int]]:
    """Comparisons (anchor, layer) of the anchor clusters that lie within so many standard errors of the threshold.

    `starts`: the first layer of each stack, which begins a cluster whatever it is like.
    """
    cka_LL = apart(cka_LL, starts)
    clusters = anchor_clusters(cka_LL, threshold)
    pairs = [
        (cluster[0], layer)
        for cluster, after in zip(clusters, [*clusters[1:], []], strict=True)
        for layer in [*cluster[1:], *after[:1]]  # the layer that begins the next cluster was compared as well
        if layer not in starts
    ]
    return [pair for pair in pairs if not abs(cka_LL[pair] - threshold) > standard_errors * stderr_LL[pair]]


def removed_by_stride(clusters: Clusters, stride: int, protected: set[int]) -> list[int]:
    """Of each cluster every stride-th layer after the first, unless it is protected."""
    return [layer for cluster in clusters for layer in cluster[1::stride] if layer not in protected]


def best_partition(cka_LL: Floats, keep: int, protected: set[int]) -> Clusters:
    """The partition into `keep` clusters, each standing for its first layer, that loses least.

    The loss is the sum over removed layers of 1 - CKA(first layer of its cluster, layer); protected layers can only be
    first. Exact, by dynamic programming over the end of the last cluster: O(L^2 keep).

    Raises:
        ValueError: `keep` is not between 1 and L, or smaller than the protected layers force.
    """
    depth = len(cka_LL)
    if not 1 <= keep <= depth:
        raise ValueError(f"{keep} layers cannot be kept of {depth}")
    cost_LL = np.full((depth, depth + 1), np.inf)  # [first, end): what the cluster loses
    for first in range(depth):
        lost = 0.0
        cost_LL[first, first + 1] = 0.0
        for end in range(first + 2, depth + 1):
            if end - 1 in protected:
                break
            lost += 1.0 - cka_LL[first, end - 1]
            cost_LL[first, end] = lost
    best = np.full((keep + 1, depth + 1), np.inf)
    best[0, 0] = 0.0
    begin = np.zeros((keep + 1, depth + 1), int)
    for count in range(1, keep + 1):
        for end in range(count, depth + 1):
            candidates = best[count - 1, :end] + cost_LL[:end, end]
            begin[count, end] = int(candidates.argmin())
            best[count, end] = candidates[begin[count, end]]
    if not np.isfinite(best[keep, depth]):
        raise ValueError(f"keeping {keep} layers would remove one of the protected {sorted(protected)}")
    clusters: Clusters = []
    end = depth
    for count in range(keep, 0, -1):
        clusters.append(list(range(begin[count, end], end)))
        end = begin[count, end]
    return clusters[::-1]
