"""Groups of consecutive layers that compute nearly the same thing. L layers; cka_LL is a matrix [L, L]."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Clusters = list[list[int]]


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


def open_decisions(
    cka_LL: Floats, stderr_LL: Floats, threshold: float, standard_errors: float
) -> list[tuple[int, int]]:
    """Comparisons (anchor, layer) of the anchor clusters that lie within so many standard errors of the threshold."""
    clusters = anchor_clusters(cka_LL, threshold)
    pairs = [
        (cluster[0], layer)
        for cluster, after in zip(clusters, [*clusters[1:], []], strict=True)
        for layer in [*cluster[1:], *after[:1]]  # the layer that begins the next cluster was compared as well
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
