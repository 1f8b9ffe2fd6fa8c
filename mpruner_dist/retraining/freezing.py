"""Which layers are trained. Imports no torch."""

from mpruner_dist.errors import UserError


def beside_gaps(kept: list[int], num_layers: int) -> list[int]:
    """The layers beside what was removed, as MPruner publishes it (arXiv 2408.13482); ascending.

    Args:
        kept: layers of the unpruned model that are left, ascending.
        num_layers: layers of the unpruned model.

    Returns:
        The last layer before each gap and the first after it, counted in the pruned model.

    Raises:
        UserError: nothing was removed, so that nothing would be trained.
    """
    bounds = [-1, *kept, num_layers]  # what was removed at an end has one neighbour
    gaps = [place for place in range(len(kept) + 1) if bounds[place + 1] > bounds[place] + 1]
    layers = sorted({layer for place in gaps for layer in (place - 1, place) if 0 <= layer < len(kept)})
    if not layers:
        raise UserError("the plan removes no layer, so that none has a gap beside it: set retrain.trainable all")
    return layers
