"""Which layers are trained. Imports no torch."""

from collections.abc import Sequence

from mpruner_dist.errors import UserError


def beside_gaps(kept: list[int], stacks: Sequence[int]) -> list[int]:
    """The layers beside what was removed, as MPruner publishes it (arXiv 2408.13482); ascending.

    Args:
        kept: layers of the unpruned model that are left, ascending.
        stacks: how many layers of the unpruned model are in each stack.

    Returns:
        The last layer before each gap and the first after it, in its stack, counted in the pruned model.

    Raises:
        UserError: nothing was removed, so that nothing would be trained.
    """
    layers: list[int] = []
    begin = before = 0
    for depth in stacks:
        mine = [layer for layer in kept if begin <= layer < begin + depth]
        bounds = [begin - 1, *mine, begin + depth]  # what was removed at an end has one neighbour
        gaps = [place for place in range(len(mine) + 1) if bounds[place + 1] > bounds[place] + 1]
        beside = {place for gap in gaps for place in (gap - 1, gap) if 0 <= place < len(mine)}
        layers += [before + place for place in sorted(beside)]
        begin, before = begin + depth, before + len(mine)
    if not layers:
        raise UserError("the plan removes no layer, so that none has a gap beside it: set retrain.trainable all")
    return layers
