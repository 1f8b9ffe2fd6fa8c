"""What similarities alone propose: layers to remove, and why. L layers, S = L + 1 states around them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpruner_dist.config import PlanConfig
from mpruner_dist.errors import UserError
from mpruner_dist.planning.clusters import (
    CLUSTERINGS,
    Clusters,
    Floats,
    best_partition,
    clusters_for,
    removed_by_stride,
    representative_first,
)
from mpruner_dist.planning.ranking import last_layers, lowest_influence, nearest_window, random_layers


@dataclass(frozen=True)
class Similarities:
    """CKA [L, L] and what else `cka.json` may hold: its standard errors, block influence [L], angles [S, S]."""

    cka_LL: Floats
    stderr_LL: Floats | None = None
    influence_L: Floats | None = None
    angular_SS: Floats | None = None

    def require(self, config: PlanConfig) -> None:
        """Refuse a method whose similarities are unknown.

        Raises:
            UserError: they are.
        """
        if config.method in (*CLUSTERINGS, "partition"):
            unknown = np.flatnonzero(~np.isfinite(np.diagonal(self.cka_LL)))
            if len(unknown):
                raise UserError(
                    f"the CKA of layer {unknown[0]} is unknown: its {config.measure} do not vary; choose the other "
                    "plan.measure"
                )
            if not np.isfinite(self.cka_LL).all():
                raise UserError("the CKA matrix holds values that are not finite: collect again")
        if config.method == "influence" and (self.influence_L is None or not np.isfinite(self.influence_L).all()):
            raise UserError("method influence needs the block influence of every layer, which is unknown here")
        if config.method == "angular" and self.angular_SS is None:
            raise UserError("method angular needs the angular distances of the states, which are unknown here")


@dataclass(frozen=True)
class Proposal:
    """Layers that go, why each of them, and the clusters of the method if it makes any."""

    dropped: list[int]
    reasons: dict[int, Any]
    clusters: Clusters = field(default_factory=list)


def propose_by_threshold(measured: Similarities, config: PlanConfig, protected: set[int]) -> Proposal:
    """The layers that clusters at `config.threshold` let go."""
    grown = CLUSTERINGS[config.method](measured.cka_LL, config.threshold)
    clusters = [representative_first(cluster, measured.cka_LL, config.keep) for cluster in grown]
    return _clustered(measured, clusters, removed_by_stride(clusters, config.stride, protected))


def propose(measured: Similarities, config: PlanConfig, protected: set[int], remove: int) -> Proposal:
    """So many layers by a method that measures no loss.

    Raises:
        ValueError: the method cannot remove so many.
    """
    depth = len(measured.cka_LL)
    if config.method in CLUSTERINGS:
        grow = CLUSTERINGS[config.method]
        return _clustered(measured, *clusters_for(grow, measured.cka_LL, remove, protected, config.keep))
    if config.method == "partition":
        clusters = best_partition(measured.cka_LL, depth - remove, protected)
        return _clustered(measured, clusters, removed_by_stride(clusters, 1, set()))
    if config.method == "influence" and measured.influence_L is not None:
        influence_L = measured.influence_L
        dropped = lowest_influence(influence_L, remove, protected)
        return Proposal(dropped, {layer: {"block_influence": float(influence_L[layer])} for layer in dropped})
    if config.method == "angular" and measured.angular_SS is not None:
        dropped = nearest_window(measured.angular_SS, remove, protected)
        across = float(measured.angular_SS[dropped[0], dropped[-1] + 1]) if dropped else 0.0
        return Proposal(dropped, {layer: {"angular_distance_of_the_window": across} for layer in dropped})
    if config.method == "last":
        dropped = last_layers(depth, remove, protected)
        return Proposal(dropped, dict.fromkeys(dropped, "one of the last layers that are not protected"))
    dropped = random_layers(depth, remove, protected, config.seed)
    return Proposal(dropped, dict.fromkeys(dropped, f"drawn at random, seed {config.seed}"))


def _clustered(measured: Similarities, clusters: Clusters, dropped: list[int]) -> Proposal:
    """With the layer that each removed one resembles, and how much; clusters begin with the layer that stays."""
    like = {layer: cluster[0] for cluster in clusters for layer in cluster}
    reasons = {}
    for layer in dropped:
        reasons[layer] = {"like": like[layer], "cka": float(measured.cka_LL[like[layer], layer])}
        if measured.stderr_LL is not None and np.isfinite(stderr := measured.stderr_LL[like[layer], layer]):
            reasons[layer]["stderr"] = float(stderr)
    return Proposal(dropped, reasons, clusters)
