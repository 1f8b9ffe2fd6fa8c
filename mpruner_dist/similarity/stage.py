"""The driver's side of `collect`: `cka.json` from the saved sums. No torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpruner_dist.config import CollectConfig
from mpruner_dist.errors import StageFailure
from mpruner_dist.runs.commit import write_json
from mpruner_dist.similarity.finalise import (
    ESTIMATORS,
    angular_distance,
    block_influence,
    cka,
    null_cka,
    top_share,
    updates_cka,
)
from mpruner_dist.similarity.sums import BatchSums, Floats, Terms, split_series

STREAMS: dict[str, Callable[[Terms], Floats]] = {"states": cka, "updates": updates_cka}
NULL_QUANTILE = 0.99
DOMINATED = 0.2
"""Share of the trace from which on the largest one in a hundred samples dominate a layer: CKA is made of squares."""

Decisions = Callable[[Floats, Floats], list[tuple[int, int]]]
"""From CKA [L, L] and its standard errors [L, L] to the pairs of layers whose comparison is not settled."""


def write_cka(
    sums_folder: Path,
    layers: list[str],
    target: Path,
    config: CollectConfig,
    measure: str = "states",
    decisions: Decisions | None = None,
    stacks: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Reduce the saved sums to `cka.json` and return its content.

    Args:
        sums_folder: where the workers saved.
        layers: their names.
        target: file to write.
        config: what was asked for.
        measure: the stream that is planned by.
        decisions: what was to be settled, if that was asked for.
        stacks: by name, how many of the layers are in each, where there are several.

    Raises:
        StageFailure: the HSIC of some layer with itself is not positive.
    """
    sums = BatchSums.load(sums_folder)
    total = sums.total()
    null_RLL = null_cka(total)
    pairs = null_RLL[:, ~np.eye(len(layers), dtype=bool)]
    pairs = pairs[np.isfinite(pairs)]  # of a series of blocks with another nothing is known
    share_L = top_share(total)
    content = {
        "layers": layers,
        "stacks": stacks,
        **measured(sums, "states"),
        "updates": measured(sums, "updates"),
        "block_influence": _listed(block_influence(total)),
        "block_influence_stderr": _listed(sums.jackknife(block_influence)),
        "angular_distance": _listed(angular_distance(total)),
        "angular_distance_stderr": _listed(sums.jackknife(angular_distance)),
        "null": {
            "mean": float(pairs.mean()),
            "quantile": float(np.quantile(pairs, NULL_QUANTILE)),
            "level": NULL_QUANTILE,
            "permutations": len(null_RLL),
        },
        "top_share": _listed(share_L),
        "dominated": [name for name, share in zip(layers, share_L, strict=True) if share > DOMINATED],
        "num_batches": len(sums),
        "asked_batches": config.num_batches,
        "open": open_pairs(sums, measure, decisions) if decisions else None,
        "num_samples": int(min(of_series["samples"] for of_series in split_series(total))),
        "unit": config.unit,
        "estimator": ESTIMATORS[config.estimator],
    }
    write_json(target, content)
    return content


def measured(sums: BatchSums, stream: str) -> dict[str, Any]:
    """CKA of a stream and its standard errors as lists, null where there is none."""
    function = STREAMS[stream]
    return {"cka": _listed(function(sums.total())), "stderr": _listed(sums.jackknife(function))}


def open_pairs(sums: BatchSums, stream: str, decisions: Decisions) -> list[list[int]]:
    """Pairs of layers whose comparison with the threshold these batches do not settle."""
    function = STREAMS[stream]
    stderr_LL = sums.jackknife(function)
    cka_LL = function(sums.total())
    no_error_LL = np.full_like(cka_LL, np.inf)
    return [list(pair) for pair in decisions(cka_LL, no_error_LL if stderr_LL is None else stderr_LL)]


def is_settled(sums: BatchSums, stream: str, decisions: Decisions) -> bool:
    """Whether these batches settle every comparison; too few for an error bar do not."""
    try:
        return not open_pairs(sums, stream, decisions)
    except StageFailure:
        return False


def _listed(values: Floats | None) -> Any:
    """As JSON: null in place of NaN, and for what is unknown."""
    if values is None:
        return None
    listed = values.astype(object)
    listed[~np.isfinite(values)] = None
    return listed.tolist()
