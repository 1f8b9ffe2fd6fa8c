"""HSIC and CKA of features: pure functions of tensors, on whatever device they are.

Shape suffixes: N samples, D features, L layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MIN_SAMPLES = 4


def gram(features_ND: Tensor) -> Tensor:
    """Linear Gram matrix [N, N], at least float32."""
    features_ND = features_ND if features_ND.dtype == torch.float64 else features_ND.float()
    return features_ND @ features_ND.T


def u_centred(gram_NN: Tensor) -> Tensor:
    """U-centred Gram matrices [..., N, N] in float64, their diagonal zero.

    Székely & Rizzo 2014, "Partial distance correlation with methods for dissimilarities", definition 2; in the form of
    Google's `representation_similarity`, which is stabler than the three terms of Song et al.
    """
    n = gram_NN.shape[-1]
    centred_NN = gram_NN.double().clone()
    centred_NN.diagonal(dim1=-2, dim2=-1).zero_()
    mean_N = centred_NN.sum(-1) / (n - 2)
    mean_N = mean_N - mean_N.sum(-1, keepdim=True) / (2 * (n - 1))
    centred_NN -= mean_N[..., :, None] + mean_N[..., None, :]
    centred_NN.diagonal(dim1=-2, dim2=-1).zero_()
    return centred_NN


def hsic_of_pairs(gram_LNN: Tensor) -> Tensor:
    """Unbiased HSIC [L, L], float64, of every pair of Gram matrices, in one matrix product.

    HSIC_1(K, L) = <U(K), U(L)> / (n (n - 3)); equal to Song et al. 2012 (JMLR 13:1393), equation 5.

    Raises:
        ValueError: fewer than 4 samples.
    """
    n = gram_LNN.shape[-1]
    if n < MIN_SAMPLES:
        raise ValueError(f"the unbiased HSIC needs {MIN_SAMPLES} samples, got {n}")
    flat = u_centred(gram_LNN).flatten(1)
    return flat @ flat.T / (n * (n - 3))


def unbiased_hsic(gram_NN: Tensor, other_NN: Tensor) -> Tensor:
    """Unbiased HSIC of two Gram matrices [N, N]: a float64 scalar, which may be negative.

    Raises:
        ValueError: fewer than 4 samples, or different shapes.
    """
    if gram_NN.shape != other_NN.shape:
        raise ValueError(f"two Gram matrices of one shape are needed, got {gram_NN.shape} and {other_NN.shape}")
    return hsic_of_pairs(torch.stack([gram_NN, other_NN]))[0, 1]


def cka_matrix(features: Sequence[Tensor]) -> Tensor:
    """Debiased linear CKA [L, L], float64, between L feature matrices [N, D_l] of the same N samples.

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), Kornblith et al. 2019 (arXiv 1905.00414), with the unbiased HSIC.
    Entries off the diagonal may lie slightly outside [0, 1]; they are not clamped.

    Raises:
        ValueError: fewer than 4 samples, unequal numbers of samples, non-finite or constant features.
    """
    fewest = min(len(feature_ND) for feature_ND in features)
    if fewest < MIN_SAMPLES:
        raise ValueError(f"the unbiased HSIC needs {MIN_SAMPLES} samples, got {fewest}")
    if len({len(feature_ND) for feature_ND in features}) > 1:
        raise ValueError(f"all layers need the same samples, got {[len(f) for f in features]}")
    for layer, feature_ND in enumerate(features):
        if not torch.isfinite(feature_ND).all():
            raise ValueError(f"features {layer} are not finite")
        if (feature_ND == feature_ND[:1]).all():
            raise ValueError(f"features {layer} are constant: CKA is undefined")
    grams = [gram(feature_ND.double() - feature_ND.double().mean(0)) for feature_ND in features]
    hsic_LL = hsic_of_pairs(torch.stack(grams))
    scale_L = hsic_LL.diagonal()
    if not (scale_L > 0).all():
        layer = int(scale_L.argmin())
        raise ValueError(f"the HSIC of features {layer} with themselves is {scale_L[layer]:.3g}: more samples needed")
    root_L = scale_L.sqrt()
    return (hsic_LL / root_L.outer(root_L)).fill_diagonal_(1.0)
