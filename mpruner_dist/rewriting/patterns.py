"""Patterns over layers: the nearest layers that keep one."""

from collections.abc import Hashable, Sequence


def nearest_matching(have: Sequence[Hashable], need: Sequence[Hashable], wanted: list[int]) -> list[int] | None:
    """Layers, ascending, whose kinds are `need` one after another, with as many of `wanted` among them as possible.

    Args:
        have: kind of each layer.
        need: kind asked for at each new place.
        wanted: layers that one would rather keep.

    Returns:
        One layer for each entry of `need`; None where no choice fits.
    """
    liked = set(wanted)
    # best[i]: for the first places, the most liked layers with the last of them at layer i, and which they are
    best: dict[int, tuple[int, tuple[int, ...]]] = {-1: (0, ())}
    for kind in need:
        further: dict[int, tuple[int, tuple[int, ...]]] = {}
        so_far: tuple[int, tuple[int, ...]] = (-1, ())
        for layer in range(-1, len(have)):
            if so_far[0] >= 0 and layer >= 0 and have[layer] == kind:
                further[layer] = (so_far[0] + (layer in liked), (*so_far[1], layer))
            if layer in best and best[layer][0] > so_far[0]:
                so_far = best[layer]
        best = further
    return list(max(best.values())[1]) if best else None
