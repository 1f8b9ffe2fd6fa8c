"""From similarities to a plan. Instant, no torch, no processes."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpruner_dist.config import PlanConfig
from mpruner_dist.errors import UserError
from mpruner_dist.plan import Plan, nearest_matching, read_plan
from mpruner_dist.planning.clusters import (
    Clusters,
    Floats,
    anchor_clusters,
    best_partition,
    removed_by_stride,
)


def make_plan(
    cka: Sequence[Sequence[float]] | Floats,
    config: PlanConfig,
    *,
    stderr: Sequence[Sequence[float]] | Floats | None = None,
    parameters: Sequence[int] | None = None,
    other_parameters: int = 0,
    pattern: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
) -> Plan:
    """Decide which layers go.

    Args:
        cka: similarity [L, L] of the layers.
        config: method, threshold, budget, protection.
        stderr: standard errors [L, L] of `cka`, told among the reasons; None if unknown.
        parameters: of each layer; needed for `target_parameters`.
        other_parameters: of the model outside its layers.
        pattern: of each layer its kind, and of each place the kind that must stand there; None asks for none.

    Raises:
        UserError: the budget, the pattern or the given plan cannot be met.
    """
    cka_LL = np.asarray(cka, np.float64)
    depth = len(cka_LL)
    if config.method == "file":
        return read_plan(config.file or Path(), depth)
    unknown = np.flatnonzero(~np.isfinite(np.diagonal(cka_LL)))
    if len(unknown):
        raise UserError(
            f"the CKA of layer {unknown[0]} is unknown: its {config.measure} do not vary; choose the other plan.measure"
        )
    if not np.isfinite(cka_LL).all():
        raise UserError("the CKA matrix holds values that are not finite: collect again")
    protected = {*range(min(config.protect_first, depth)), *range(max(depth - config.protect_last, 0), depth)}
    if config.method == "anchor":
        clusters = anchor_clusters(cka_LL, config.threshold)
        dropped = removed_by_stride(clusters, config.stride, protected)
    else:
        clusters = _partition(cka_LL, config, protected, parameters, other_parameters)
        dropped = removed_by_stride(clusters, 1, set())
    kept = [layer for layer in range(depth) if layer not in dropped]
    if pattern is not None:
        kept = _nearest(kept, pattern, protected)
        dropped = [layer for layer in range(depth) if layer not in kept]
    reasons = _reasons(clusters, dropped, cka_LL, np.asarray(stderr) if stderr is not None else None)
    return Plan.keeping(depth, kept, clusters=clusters, reasons=reasons, method=config.method)


def _nearest(kept: list[int], pattern: tuple[Sequence[Hashable], Sequence[Hashable]], protected: set[int]) -> list[int]:
    """As many layers, in the pattern, and as many of them as possible among those that were to be kept."""
    have, need = pattern
    found = nearest_matching(have, need[: len(kept)], kept)
    if found is None:
        raise UserError(f"plan.preserve_pattern: no {len(kept)} layers keep the pattern of kinds; keep more layers")
    lost = sorted(protected - set(found))
    if lost:
        raise UserError(
            f"plan.preserve_pattern: the nearest {len(kept)} layers that keep the pattern leave out layers {lost}, "
            "which plan.protect_first and plan.protect_last keep: lower those, or keep another number of layers"
        )
    return found


def _partition(
    cka_LL: Floats, config: PlanConfig, protected: set[int], parameters: Sequence[int] | None, other: int
) -> Clusters:
    depth = len(cka_LL)
    least = len(protected | {0})  # the first layer always begins a cluster
    try:
        if config.keep_layers is not None:
            return best_partition(cka_LL, config.keep_layers, protected)
        target, sizes = config.target_parameters or 0, parameters or []
        for keep in range(depth, least - 1, -1):
            clusters = best_partition(cka_LL, keep, protected)
            left = other + sum(sizes[cluster[0]] for cluster in clusters)
            if left <= target:
                return clusters
    except ValueError as error:
        raise UserError(f"plan.keep_layers: {error}") from error
    raise UserError(
        f"plan.target_parameters {target:,} cannot be met: with {least} of {depth} layers the model "
        f"still has {left:,} parameters"
    )


def _reasons(clusters: Clusters, dropped: list[int], cka_LL: Floats, stderr_LL: Floats | None) -> dict[str, Any]:
    """For every dropped layer the layer it resembles, and how much."""
    anchor = {layer: cluster[0] for cluster in clusters for layer in cluster}
    reasons: dict[str, Any] = {}
    for layer in dropped:
        if anchor[layer] == layer:
            reasons[str(layer)] = "another layer takes its place, so that the kinds keep their pattern"
            continue
        reason: dict[str, Any] = {"like": anchor[layer], "cka": float(cka_LL[anchor[layer], layer])}
        if stderr_LL is not None:
            reason["stderr"] = float(stderr_LL[anchor[layer], layer])
        reasons[str(layer)] = reason
    return reasons
