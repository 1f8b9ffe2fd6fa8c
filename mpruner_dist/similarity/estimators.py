"""The estimators' side of a batch: from one layer's features after another to additive terms.

Each keeps something small of every layer as the forward pass goes by, then makes terms that may be summed over batches,
workers and restarts; `similarity/finalise.py` makes CKA of the sums. A stream is one kind of feature: the states that
the blocks hand on, or their updates of them.

Shape suffixes: N samples, D features, L layers, G of them at once, P entries of a triangle, R permutations.
"""

from typing import Protocol

import torch
from torch import Tensor

from mpruner_dist.errors import UserError
from mpruner_dist.similarity.hsic import (
    gram,
    h_centred,
    layers_at_once,
    pack,
    products_of_pairs,
    products_with_permuted,
    u_centred,
    unpack,
)

FEATURE_LIMIT = 2048
"""Layers times width up to which cross-covariances of all pairs of layers are kept: 34 MB a batch and matrix."""

ROUNDING = 1e-6
"""Of the largest entry of a Gram matrix in float32: what varies less within a sequence is only rounding."""


class Estimator(Protocol):
    """What one stream of one batch goes through."""

    def keep(self, features_GND: Tensor) -> None:
        """Take the next layers' features."""

    def terms(self, chosen_N: Tensor, groups_N: Tensor, orders_RN: Tensor) -> dict[str, Tensor]:
        """The batch's terms, float64.

        Args:
            chosen_N: indices of the samples that count.
            groups_N: which sequence each of these comes from.
            orders_RN: permutations of these; one side of a pair so shuffled gives the null.
        """


def make_estimator(name: str, layers: int) -> Estimator:
    """An estimator for one stream of one batch of a model with so many layers."""
    if name == "feature":
        return MomentTerms(layers)
    return SentenceTerms(layers, debiased=False) if name == "sentence" else HsicTerms(layers, name == "debiased")


class HsicTerms:
    """HSIC of all pairs of layers: `hsic` [L, L] and `null` [R, L, L].

    debiased: HSIC_1, Song et al. 2012 (JMLR 13:1393), equation 5. biased: HSIC_0 = tr(KHLH) / (n - 1)^2, Gretton et
    al. 2005. Both are inner products of centred Gram matrices, of which the packed triangle is kept, L N (N + 1) / 2
    float32 numbers.
    """

    def __init__(self, layers: int, debiased: bool) -> None:
        self.layers, self.debiased = layers, debiased
        self.centre = u_centred if debiased else h_centred
        self.samples = self.kept = 0
        self.packed_LP = torch.empty(0)

    def keep(self, features_GND: Tensor) -> None:
        """Take the next layers' features."""
        # HSIC does not see a shift; float32 does
        packed_GP = pack(self.centre(gram(features_GND - features_GND.mean(1, keepdim=True))))
        if self.kept == 0:
            self.samples = features_GND.shape[1]
            self.packed_LP = packed_GP.new_empty(self.layers, packed_GP.shape[1])
        self.packed_LP[self.kept : self.kept + len(packed_GP)] = packed_GP
        self.kept += len(packed_GP)

    def part(self, chosen_N: Tensor) -> Tensor:
        """Triangles [L, P] of these samples alone, centred among themselves."""
        if len(chosen_N) == self.samples:
            return self.packed_LP
        return torch.cat([
            pack(self.centre(unpack(packed_GP, self.samples)[:, chosen_N][:, :, chosen_N]))
            for packed_GP in torch.split(self.packed_LP, layers_at_once(self.samples**2, self.packed_LP.device))
        ])  # fmt: skip

    def terms(self, chosen_N: Tensor, groups_N: Tensor, orders_RN: Tensor) -> dict[str, Tensor]:
        """`hsic` and `null` of the batch; see Estimator."""
        n = len(chosen_N)
        packed_LP = self.part(chosen_N)
        scale = n * (n - 3) if self.debiased else (n - 1) ** 2
        null_RLL = packed_LP.new_zeros(len(orders_RN), self.layers, self.layers)
        for index, order_N in enumerate(orders_RN):
            null_RLL[index] = products_with_permuted(packed_LP, order_N)
        return {"hsic": products_of_pairs(packed_LP).double() / scale, "null": null_RLL.double() / scale}


class SentenceTerms(HsicTerms):
    """CKA with HSIC_0 within each sequence, to be averaged over sequences: what MPruner's released code computes.

    The terms are `ratio`, `count` [L, L] and `null_ratio`, `null_count` [R, L, L]. As in the release a sequence counts
    for a pair only where the ratio exists. Unrelated features of n tokens and width d score about d / (d + n).
    """

    def terms(self, chosen_N: Tensor, groups_N: Tensor, orders_RN: Tensor) -> dict[str, Tensor]:
        """Ratios and counts of the batch; see Estimator."""
        zeros_LL = torch.zeros(self.layers, self.layers, dtype=torch.float64, device=self.packed_LP.device)
        zeros_RLL = torch.zeros(len(orders_RN), *zeros_LL.shape, dtype=torch.float64, device=self.packed_LP.device)
        sums = {"ratio": zeros_LL, "count": zeros_LL.clone(), "null_ratio": zeros_RLL, "null_count": zeros_RLL.clone()}
        for group in torch.unique(groups_N):
            inside = groups_N == group
            packed_LP = self.part(chosen_N[inside])
            hsic_LL = products_of_pairs(packed_LP).double()
            root_L = hsic_LL.diagonal().sqrt()
            exists_L = root_L > ROUNDING * self.packed_LP.abs().amax(1)
            exists_LL = exists_L.outer(exists_L)
            scale_LL = root_L.outer(root_L).masked_fill(~exists_LL, torch.inf)
            sums["ratio"] += hsic_LL / scale_LL
            sums["count"] += exists_LL
            for index, order_N in enumerate(orders_RN):
                within = order_N[inside].argsort()  # any order within the sequence will do
                sums["null_ratio"][index] += products_with_permuted(packed_LP, within).double() / scale_LL
                sums["null_count"][index] += exists_LL
        return sums


class MomentTerms:
    """Sums and cross-products of the features of all layers: CKA with HSIC_0 of all samples of all batches, exactly.

    The terms are `sum` [L, D], `cross` [L, D, L, D], `size` and `null_cross` [1, L, D, L, D]. Kornblith et al. 2019
    (arXiv 1905.00414), section 3: ||Y'X||_F^2 in place of Gram matrices; for narrow models.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.kept: list[Tensor] = []

    def keep(self, features_GND: Tensor) -> None:
        """Take the next layers' features.

        Raises:
            UserError: the model is too wide for this, or its layers are not equally wide.
        """
        width = features_GND.shape[2]
        if self.layers * width > FEATURE_LIMIT:
            raise UserError(
                f"collect.estimator feature keeps all cross-covariances of {self.layers} layers x {width} features, "
                f"{(self.layers * width) ** 2 * 8 / 1e9:.2g} GB a batch: it is for models with layers x width up to "
                f"{FEATURE_LIMIT}; use estimator debiased"
            )
        if self.kept and self.kept[0].shape[1] != width:
            raise UserError("collect.estimator feature needs layers of equal width, stages have not: use debiased")
        self.kept += features_GND.double().unbind()

    def terms(self, chosen_N: Tensor, groups_N: Tensor, orders_RN: Tensor) -> dict[str, Tensor]:
        """Moments of the batch; see Estimator."""
        features_NLD = torch.stack([features_ND[chosen_N] for features_ND in self.kept], 1)
        shape = features_NLD.shape[1:]
        flat = features_NLD.flatten(1)
        null = [flat.T @ flat[order_N] for order_N in orders_RN[:1]]
        return {
            "sum": features_NLD.sum(0),
            "cross": (flat.T @ flat).view(*shape, *shape),
            "null_cross": torch.stack(null).view(len(null), *shape, *shape),
            "size": torch.tensor(float(len(flat)), dtype=torch.float64),
        }
