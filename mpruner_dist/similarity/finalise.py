"""From summed terms to what they estimate: CKA, its null, block influence, angular distances. No torch.

Terms of the two streams are named `states.` and `updates.`, then as `similarity/estimators.py` names them.

Shape suffixes: L layers, S = L + 1 states (the input of each layer, and the output of the last), D features,
R permutations.
"""

import numpy as np

from mpruner_dist.errors import StageFailure
from mpruner_dist.similarity.sums import Floats, Terms

ESTIMATORS = {
    "debiased": "unbiased HSIC per batch, summed before the ratio (Nguyen, Raghu & Kornblith 2021)",
    "biased": "biased HSIC per batch, summed before the ratio",
    "sentence": "biased CKA within each sequence, averaged over sequences (as MPruner was released)",
    "feature": "biased HSIC of all samples at once, from cross-covariances (Kornblith et al. 2019)",
}


def cka(terms: Terms, stream: str = "states") -> Floats:
    """CKA [L, L] of a stream.

    Minibatch CKA is equation 3 of Nguyen, Raghu & Kornblith 2021 (arXiv 2010.15327). Entries may lie slightly outside
    [0, 1]; none is clamped.

    Raises:
        StageFailure: the HSIC of some layer with itself is not positive.
    """
    if f"{stream}.ratio" in terms:
        return _mean_ratio(terms[f"{stream}.ratio"], terms[f"{stream}.count"])
    hsic_LL = _hsic(terms, stream)
    root_L = np.sqrt(_positive(np.diagonal(hsic_LL)))
    cka_LL: Floats = hsic_LL / root_L[:, None] / root_L[None, :]
    np.fill_diagonal(cka_LL, 1.0)
    return (cka_LL + cka_LL.T) / 2


def null_cka(terms: Terms, stream: str = "states") -> Floats:
    """What unrelated features of the same spectra and sample size score: CKA [R, L, L] after permutation."""
    if f"{stream}.ratio" in terms:
        return _mean_ratio(terms[f"{stream}.null_ratio"], terms[f"{stream}.null_count"])
    root_L = np.sqrt(_positive(np.diagonal(_hsic(terms, stream))))
    if f"{stream}.cross" in terms:
        covariances = terms[f"{stream}.null_cross"] - _outer_mean(terms, stream)
        null_RLL = (covariances**2).sum((2, 4))
    else:
        null_RLL = terms[f"{stream}.null"]
    return np.asarray(null_RLL / root_L[:, None] / root_L[None, :])


def updates_cka(terms: Terms) -> Floats:
    """CKA [L, L] of the updates; NaN for layers whose updates hardly vary, as those of an idle block do not."""
    if "updates.ratio" in terms:
        with np.errstate(invalid="ignore"):
            return np.asarray(terms["updates.ratio"] / terms["updates.count"])
    hsic_LL = _hsic(terms, "updates")
    scale_L = np.diagonal(hsic_LL)
    root_L = np.sqrt(np.where(scale_L > 0, scale_L, np.nan))
    cka_LL = hsic_LL / root_L[:, None] / root_L[None, :]
    np.fill_diagonal(cka_LL, np.where(scale_L > 0, 1.0, np.nan))
    return np.asarray((cka_LL + cka_LL.T) / 2)


def block_influence(terms: Terms) -> Floats:
    """1 - mean cosine of the input and output of each block [L]: Men et al. 2024 (arXiv 2403.03853), equation 1."""
    return np.asarray(1.0 - terms["cosine"] / terms["samples"])


def angular_distance(terms: Terms) -> Floats:
    """Mean angle / pi between every two states [S, S]: Gromov et al. 2024 (arXiv 2403.17887), equation 7.

    The distance across a window of n layers from layer l is entry [l, l + n].
    """
    return np.asarray(terms["angle"] / terms["angle_samples"])


def top_share(terms: Terms) -> Floats:
    """Share [L] of the trace of the Gram matrix that the largest one in a hundred samples hold, mean over batches."""
    return np.asarray(terms["top_share"] / terms["batches_counted"])


def _hsic(terms: Terms, stream: str) -> Floats:
    if f"{stream}.hsic" in terms:
        return terms[f"{stream}.hsic"]
    covariances = terms[f"{stream}.cross"] - _outer_mean(terms, stream)
    return np.asarray((covariances**2).sum((1, 3)))


def _outer_mean(terms: Terms, stream: str) -> Floats:
    sum_LD = terms[f"{stream}.sum"]
    return np.asarray(np.multiply.outer(sum_LD, sum_LD) / terms[f"{stream}.size"])


def _mean_ratio(ratio: Floats, count: Floats) -> Floats:
    if not (count > 0).all():
        raise StageFailure(f"layer {_first_bad(count)} is constant within every sequence: its CKA is undefined")
    return np.asarray(ratio / count)


def _first_bad(count: Floats) -> int:
    return int(np.argwhere(np.diagonal(count, axis1=-2, axis2=-1) <= 0)[0][-1])


def _positive(scale_L: Floats) -> Floats:
    bad = [layer for layer in range(len(scale_L)) if not scale_L[layer] > 0]
    if bad:
        raise StageFailure(
            f"the HSIC of layer {bad[0]} with itself is {scale_L[bad[0]]:.3g}, it must be positive: its features "
            "hardly vary over the samples; raise collect.samples or collect.num_batches"
        )
    return scale_L
