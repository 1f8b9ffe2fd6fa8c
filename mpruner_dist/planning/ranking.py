"""Layers by a score of their own, and the simplest baselines. L layers, S = L + 1 states around them."""

import numpy as np

from mpruner_dist.planning.clusters import Floats


def lowest_influence(influence_L: Floats, remove: int, protected: set[int]) -> list[int]:
    """The layers of lowest block influence, lowest first (ShortGPT, arXiv 2403.03853)."""
    return [layer for layer in np.argsort(influence_L, kind="stable").tolist() if layer not in protected][:remove]


def nearest_window(distance_SS: Floats, remove: int, protected: set[int]) -> list[int]:
    """The consecutive layers n to n + remove - 1 with the least angle between states n and n + remove.

    As in "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887).

    Raises:
        ValueError: every window of so many layers holds a protected one, or has no distance.
    """
    if remove == 0:
        return []
    across = {
        first: distance_SS[first, first + remove]
        for first in range(len(distance_SS) - remove)
        if not protected & set(range(first, first + remove)) and np.isfinite(distance_SS[first, first + remove])
    }
    if not across:
        raise ValueError(f"no {remove} consecutive layers with a known distance go without {sorted(protected)}")
    first = min(across, key=lambda first: across[first])
    return list(range(first, first + remove))


def last_layers(depth: int, remove: int, protected: set[int]) -> list[int]:
    """The deepest layers that are not protected, deepest first."""
    return [layer for layer in range(depth - 1, -1, -1) if layer not in protected][:remove]


def random_layers(depth: int, remove: int, protected: set[int], seed: int) -> list[int]:
    """Layers in an order drawn by the seed: a larger number of them holds a smaller one."""
    order = np.random.default_rng(seed).permutation(depth).tolist()
    return [layer for layer in order if layer not in protected][:remove]
