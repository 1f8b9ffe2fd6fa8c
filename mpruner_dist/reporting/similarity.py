"""What `cka.json` says, in the words and rows of a report; matrices are lists of lists, null where unknown."""

from typing import Any

import numpy as np

from mpruner_dist.config import CollectConfig
from mpruner_dist.plan import format_layers

LAYER_HEADINGS = ("layer", "block influence", "CKA with the next", "the same of updates", "trace held by 1 %")
WINDOW_HEADINGS = ("layers in the window", "nearest to no change", "angular distance")
Similarity = dict[str, Any]


def measurement(similarity: Similarity, collect: CollectConfig, data: dict[str, Any], reads: str) -> list[str]:
    """How the similarity was measured, one line a fact."""
    unit, null = similarity["unit"], similarity["null"]
    rows = f"sequences of {'' if data['packed'] else 'at most '}{data['block_size']} tokens"
    skipped = f"positions left out at the start of each sequence: {collect.skip_tokens}; "
    if reads == "speech":
        rows = "recordings"
    if unit == "image":
        rows, skipped = "images", ""
    outliers = (
        f"{unit}s whose norm in any layer exceeds {collect.outlier_norm:g} times the median of that layer are left out"
        if collect.outlier_norm is not None
        else f"no {unit} is left out as an outlier"
    )
    scale = "is divided by its root mean square" if collect.normalize else "is taken as it is"
    return [
        f"{similarity['num_batches']} batches of {collect.batch_size} {rows} from the "
        f"calibration part; {similarity['num_samples']:,} {unit}s compared, at most {collect.samples} of a batch",
        *_saving(similarity, collect),
        f"estimator: linear CKA, {similarity['estimator']}",
        f"null: with the {unit}s of one layer shuffled, which makes the layers unrelated and leaves everything else as "
        f"it is, CKA is {null['mean']:.4f} on average and below {null['quantile']:.4f} in {null['level']:.0%} of the "
        f"pairs ({null['permutations']} permutations of each batch)",
        f"{skipped}{outliers}",
        f"each activation vector {scale}",
        "standard error: jackknife over the batches"
        if similarity["stderr"]
        else "standard error: unknown, a single batch has no spread",
    ]


def domination(similarity: Similarity) -> str:
    """A warning that names the layers where few samples dominate; empty if there are none."""
    if not similarity["dominated"]:
        return ""
    named = set(similarity["dominated"])
    layers = [layer for layer, name in enumerate(similarity["layers"]) if name in named]
    unit = similarity["unit"]
    return (
        f"In layers {format_layers(layers).replace(',', ', ')} few {unit}s dominate: the largest one in a hundred "
        f"{unit}s of a batch hold up to {max(similarity['top_share']):.0%} of the trace of the Gram matrix, so that "
        f"CKA shows these {unit}s and not the layer. collect.normalize true and a lower collect.outlier_norm guard "
        "against that."
    )


def layer_rows(similarity: Similarity) -> list[tuple[str, ...]]:
    """What was measured of each layer, under LAYER_HEADINGS."""
    updates = similarity["updates"]
    rows: list[tuple[str, ...]] = []
    for layer in range(len(similarity["layers"])):
        rows.append((
            str(layer),
            _with_error(similarity["block_influence"], similarity["block_influence_stderr"], layer),
            _with_error(_beside_diagonal(similarity["cka"]), _beside_diagonal(similarity["stderr"]), layer),
            _with_error(_beside_diagonal(updates["cka"]), _beside_diagonal(updates["stderr"]), layer),
            f"{similarity['top_share'][layer]:.1%}",
        ))  # fmt: skip
    return rows


def window_rows(similarity: Similarity) -> list[tuple[str, ...]]:
    """For up to half of the layers, which window of so many changes the states least, under WINDOW_HEADINGS.

    A window lies in one stack: none is longer than the longest.
    """
    distance_SS = np.asarray(similarity["angular_distance"])
    rows: list[tuple[str, ...]] = []
    longest = max((similarity.get("stacks") or {"": len(similarity["layers"])}).values())
    for length in range(1, min(len(similarity["layers"]) // 2, longest) + 1):
        first = int(np.diagonal(distance_SS, length).argmin())
        across, errors = (
            _beside_diagonal(similarity[name], length) for name in ("angular_distance", "angular_distance_stderr")
        )
        last = f"-{first + length - 1}" if length > 1 else ""
        rows.append((str(length), f"{first}{last}", _with_error(across, errors, first)))
    return rows


def _saving(similarity: Similarity, collect: CollectConfig) -> list[str]:
    if collect.until == "all":
        return []
    done, asked = similarity["num_batches"], similarity["asked_batches"]
    if similarity["open"]:
        pairs = ", ".join(f"{one} and {other}" for one, other in similarity["open"])
        return [
            f"not settled after all {asked} batches: the CKA of layers {pairs} lies within {collect.settled_z:g} "
            "standard errors of the threshold"
        ]
    return [
        f"settled after {done} of {asked} batches: every comparison of the clusters lies more than "
        f"{collect.settled_z:g} standard errors from the threshold; {1 - done / asked:.0%} of the work was saved"
    ]


def _beside_diagonal(matrix: list[list[float | None]] | None, offset: int = 1) -> list[float | None] | None:
    return None if matrix is None else [matrix[layer][layer + offset] for layer in range(len(matrix) - offset)]


def _with_error(values: list[Any] | None, errors: list[Any] | None, layer: int) -> str:
    if values is None or layer >= len(values):
        return ""
    if values[layer] is None:
        return "unknown"
    return f"{values[layer]:.4f}" + ("" if errors is None or errors[layer] is None else f" ± {errors[layer]:.4f}")
