"""HSIC and CKA of features: pure functions of tensors, on whatever device they are.

Shape suffixes: N samples, D features, L layers, P = N (N + 1) / 2 entries of a triangle.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

MIN_SAMPLES = 4
PERMUTED_AT_ONCE = 8
AT_ONCE = 1 << 24
"""Numbers of the layers that are worked on together on a GPU: 67 MB in float32."""


def layers_at_once(numbers: int, device: torch.device) -> int:
    """How many layers of so many numbers are worked on together.

    What a GPU does with one layer takes less time than to start it; a CPU is quicker with what its caches hold.
    """
    return max(1, AT_ONCE // numbers) if device.type == "cuda" else 1


def gram(features_ND: Tensor) -> Tensor:
    """Linear Gram matrices [..., N, N] of features [..., N, D], at least float32."""
    features_ND = features_ND if features_ND.dtype == torch.float64 else features_ND.float()
    return features_ND @ features_ND.mT


def u_centred(gram_NN: Tensor) -> Tensor:
    """U-centred Gram matrices [..., N, N] in the same dtype, their diagonal zero.

    Székely & Rizzo 2014, "Partial distance correlation with methods for dissimilarities", definition 2; in the form of
    Google's `representation_similarity`, which is stabler than the three terms of Song et al. Centring is a projection:
    a part [S, S] of a centred matrix, centred again, is the centred part of the matrix itself.
    """
    n = gram_NN.shape[-1]
    centred_NN = gram_NN.clone()
    centred_NN.diagonal(dim1=-2, dim2=-1).zero_()
    mean_N = centred_NN.sum(-1, dtype=torch.float64) / (n - 2)
    mean_N = (mean_N - mean_N.sum(-1, keepdim=True) / (2 * (n - 1))).to(centred_NN.dtype)
    centred_NN -= mean_N[..., :, None]
    centred_NN -= mean_N[..., None, :]
    centred_NN.diagonal(dim1=-2, dim2=-1).zero_()
    return centred_NN


def h_centred(gram_NN: Tensor) -> Tensor:
    """H K H with H = I - 11'/n, [..., N, N] in the same dtype: Gram matrices of centred features. A projection too."""
    mean_N = gram_NN.mean(-1, dtype=torch.float64)
    half_N = (mean_N - mean_N.mean(-1, keepdim=True) / 2).to(gram_NN.dtype)
    return gram_NN - half_N[..., :, None] - half_N[..., None, :]


@lru_cache(maxsize=8)
def triangle(n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Upper triangle of an [N, N] matrix, diagonal included: flat positions [P], int64, and weights [P].

    The weights, 1 on the diagonal and the square root of 2 beside it, make the inner product of two triangles that of
    the symmetric matrices.
    """
    rows, columns = torch.triu_indices(n, n, device=device)
    weights_P = torch.full((len(rows),), 2**0.5, dtype=dtype, device=device)
    weights_P[rows == columns] = 1.0
    return rows * n + columns, weights_P


def pack(matrix_NN: Tensor) -> Tensor:
    """The weighted triangles [..., P] of symmetric matrices, in their dtype: half the memory, equal inner products."""
    flat_P, weights_P = triangle(matrix_NN.shape[-1], matrix_NN.device, matrix_NN.dtype)
    return matrix_NN.flatten(-2).index_select(-1, flat_P).mul_(weights_P)


def unpack(packed_P: Tensor, n: int) -> Tensor:
    """The symmetric matrices [..., N, N] of weighted triangles."""
    flat_P, weights_P = triangle(n, packed_P.device, packed_P.dtype)
    half_NN = packed_P.new_zeros(*packed_P.shape[:-1], n * n)
    half_NN[..., flat_P] = packed_P / weights_P
    half_NN = half_NN.view(*packed_P.shape[:-1], n, n)
    return half_NN + half_NN.triu(1).mT


@lru_cache(maxsize=2)
def _places(n: int, device: torch.device) -> Tensor:
    """Where in a triangle each entry of its symmetric matrix lies, int64 [N, N]."""
    flat_P, _ = triangle(n, device, torch.float32)
    place_NN = flat_P.new_zeros(n * n)
    place_NN[flat_P] = torch.arange(len(flat_P), device=device)
    place_NN = place_NN.view(n, n)
    return place_NN + place_NN.triu(1).T


def permuted_places(order_N: Tensor) -> Tensor:
    """Where in a triangle the entries [P] lie of the one whose matrix has rows and columns in another order, int64."""
    n = len(order_N)
    flat_P, _ = triangle(n, order_N.device, torch.float32)
    return _places(n, order_N.device)[order_N][:, order_N].flatten()[flat_P]


def products_of_pairs(rows_LP: Tensor) -> Tensor:
    """Inner products of all pairs of rows, [L, L], symmetric to the last bit: matrix products are not everywhere."""
    upper_LL = (rows_LP @ rows_LP.T).triu()
    return upper_LL + upper_LL.triu(1).T


def products_with_permuted(packed_LP: Tensor, order_N: Tensor) -> Tensor:
    """Inner products [L, L] of the matrices with themselves, rows and columns of the second in another order."""
    place_P = permuted_places(order_N)
    # a few at a time: a copy of all of them would take as much memory as they do
    at_once = max(PERMUTED_AT_ONCE, layers_at_once(len(place_P), packed_LP.device))
    parts = [packed_LP @ part.index_select(1, place_P).T for part in torch.split(packed_LP, at_once)]
    return torch.cat(parts, 1)


def hsic_of_pairs(gram_LNN: Tensor) -> Tensor:
    """Unbiased HSIC [L, L], float64, of every pair of Gram matrices, in one matrix product.

    HSIC_1(K, L) = <U(K), U(L)> / (n (n - 3)); equal to Song et al. 2012 (JMLR 13:1393), equation 5.

    Raises:
        ValueError: fewer than 4 samples.
    """
    n = gram_LNN.shape[-1]
    if n < MIN_SAMPLES:
        raise ValueError(f"the unbiased HSIC needs {MIN_SAMPLES} samples, got {n}")
    flat = u_centred(gram_LNN.double()).flatten(1)
    return products_of_pairs(flat) / (n * (n - 3))


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
