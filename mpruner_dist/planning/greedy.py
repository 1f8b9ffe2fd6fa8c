"""Layers removed one after another by loss. L layers, B batches of text; no torch, no processes."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mpruner_dist.errors import StageFailure
from mpruner_dist.planning.losses import Losses
from mpruner_dist.planning.proposals import Proposal


def greedy(losses: Losses, free: list[int], is_met: Callable[[list[int]], bool]) -> Proposal:
    """Remove the layer whose removal leaves the lowest loss, and measure all that is left anew, until it is enough.

    As in SLEB (arXiv 2402.09025). The loss of the whole text is measured F + (F - 1) + (F - 2) + ... times.

    Args:
        losses: of plans on text.
        free: the F layers that may go.
        is_met: whether enough layers are gone.
    """
    dropped: list[int] = []
    while not is_met(dropped) and len(dropped) < len(free):
        candidates = [[*dropped, layer] for layer in free if layer not in dropped]
        losses.measure(candidates, losses.batches)
        dropped = min(candidates, key=losses.loss)
    return Proposal(dropped, steps(losses, dropped))


def steps(losses: Losses, dropped: list[int]) -> dict[int, Any]:
    """For each layer, in the order in which they went, the loss before and after.

    Raises:
        StageFailure: the plan breaks the model.
    """
    path = [losses.loss(dropped[:number]) for number in range(len(dropped) + 1)]
    if not np.isfinite(path).all():
        raise StageFailure(
            f"without layers {sorted(dropped)} the model's loss is not finite: keep more layers, or try model.dtype "
            "float32 or bfloat16"
        )
    return {
        layer: {"step": number + 1, "loss_before": path[number], "loss_after": path[number + 1]}
        for number, layer in enumerate(dropped)
    }
