"""Layers removed one after another by loss. L layers, B batches of text; no torch, no processes."""

from collections.abc import Callable

from mpruner_dist.planning.losses import Losses
from mpruner_dist.planning.proposals import Proposal


def greedy(losses: Losses, free: list[int], is_met: Callable[[list[int]], bool]) -> Proposal:
    """Remove the layer whose removal leaves the lowest loss, and measure all that is left anew, until it is enough.

    As in SLEB (arXiv 2402.09025). The loss of the whole text is measured F + (F - 1) + (F - 2) + ... times.

    Args:
        losses: of plans on text.
        free: the F layers that may go.
        is_met: whether enough layers are gone.

    Raises:
        StageFailure: the plan breaks the model.
    """
    dropped: list[int] = []
    while not is_met(dropped) and len(dropped) < len(free):
        candidates = [[*dropped, layer] for layer in free if layer not in dropped]
        losses.measure(candidates, losses.batches)
        dropped = min(candidates, key=losses.loss)
    path = [dropped[:number] for number in range(len(dropped) + 1)]
    losses.require_finite(path)
    reasons = {
        layer: {"step": number + 1, "loss_before": losses.loss(before), "loss_after": losses.loss(after)}
        for number, (layer, before, after) in enumerate(zip(dropped, path, path[1:], strict=False))
    }
    return Proposal(dropped, reasons)


def greedy_passes(free: int, remove: int) -> int:
    """Passes that removing so many of `free` layers takes, with that of the whole model."""
    return 1 + sum(range(free, free - remove, -1))
