"""From summed terms to what they estimate: CKA, its null, block influence, angular distances. No torch.

Terms of the two streams are named `states.` and `updates.`, then as `similarity/estimators.py` names them.

Shape suffixes: L layers, S = L + 1 states (the input of each layer, and the output of the last), D features,
R permutations.
"""

from collections.abc import Callable
from functools import wraps

import numpy as np

from mpruner_dist.errors import StageFailure
from mpruner_dist.similarity.sums import Floats, Terms, split_series

ESTIMATORS = {
    "debiased": "unbiased HSIC per batch, summed before the ratio (Nguyen, Raghu & Kornblith 2021)",
    "biased": "biased HSIC per batch, summed before the ratio",
    "sentence": "biased CKA within each sequence, averaged over sequences (as MPruner was released)",
    "feature": "biased HSIC of all samples at once, from cross-covariances (Kornblith et al. 2019)",
}


Of = Callable[[Terms], Floats]


def over_series(common: int = 0, between: float = np.nan) -> Callable[[Of], Of]:
    """Makes a function of the terms of one series of blocks one of several: matrices stand along the diagonal.

    Args:
        common: rows that the matrices of two neighbouring series share.
        between: what stands for pairs of different series.
    """

    def decorate(function: Of) -> Of:
        @wraps(function)
        def of_all(terms: Terms) -> Floats:
            series = split_series(terms)
            found = []
            for number, of_one in enumerate(series, 1):
                try:
                    found.append(function(of_one))
                except StageFailure as error:
                    where = "" if len(series) == 1 else f"stack {number} of {len(series)}: "
                    raise StageFailure(f"{where}{error}") from error
            return _along_diagonal(found, common, between)

        return of_all

    return decorate


def _along_diagonal(found: list[Floats], common: int, between: float) -> Floats:
    if len(found) == 1:
        return found[0]
    if found[0].ndim == 1:
        return np.concatenate(found)
    size = sum(part.shape[-1] - common for part in found) + common
    joined = np.full((*found[0].shape[:-2], size, size), between)
    first = 0
    for part in found:
        end = first + part.shape[-1]
        joined[..., first:end, first:end] = part
        first = end - common
    return joined


@over_series()
def cka(terms: Terms) -> Floats:
    """CKA [L, L] of the states.

    Minibatch CKA is equation 3 of Nguyen, Raghu & Kornblith 2021 (arXiv 2010.15327). Entries may lie slightly outside
    [0, 1]; none is clamped.

    Raises:
        StageFailure: the HSIC of some layer with itself is not positive.
    """
    if "states.ratio" in terms:
        return _mean_ratio(terms["states.ratio"], terms["states.count"])
    hsic_LL = _hsic(terms, "states")
    root_L = np.sqrt(_positive(np.diagonal(hsic_LL)))
    cka_LL: Floats = hsic_LL / root_L[:, None] / root_L[None, :]
    np.fill_diagonal(cka_LL, 1.0)
    return (cka_LL + cka_LL.T) / 2


@over_series()
def null_cka(terms: Terms) -> Floats:
    """What unrelated features of the same spectra and sample size score: CKA [R, L, L] after permutation."""
    if "states.ratio" in terms:
        return _mean_ratio(terms["states.null_ratio"], terms["states.null_count"])
    root_L = np.sqrt(_positive(np.diagonal(_hsic(terms, "states"))))
    if "states.cross" in terms:
        covariances = terms["states.null_cross"] - _outer_mean(terms, "states")
        null_RLL = (covariances**2).sum((2, 4))
    else:
        null_RLL = terms["states.null"]
    return np.asarray(null_RLL / root_L[:, None] / root_L[None, :])


@over_series()
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


@over_series()
def block_influence(terms: Terms) -> Floats:
    """1 - mean cosine of the input and output of each block [L]: Men et al. 2024 (arXiv 2403.03853), equation 1."""
    return np.asarray(1.0 - terms["cosine"] / terms["samples"])


# counted through, the state that goes into a series has the number of the one that comes out of the series before
@over_series(common=1, between=1.0)
def angular_distance(terms: Terms) -> Floats:
    """Mean angle / pi between every two states [S, S]: Gromov et al. 2024 (arXiv 2403.17887), equation 7.

    The distance across a window of n layers from layer l is entry [l, l + n].
    """
    return np.asarray(terms["angle"] / terms["angle_samples"])


@over_series()
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
