"""A plan by loss within a stated number of forward passes. L layers, B batches of text; no torch, no processes.

What removing a layer costs hardly depends on which others are gone, unless they are its neighbours. So the cost of
each layer is measured once, and then only looked at again where that may change the choice: the neighbours of a layer
that went, and the few of lowest cost (lazy greedy, Minoux 1978). A quarter of the text tells most of it, for the
change of a cost varies much less from text to text than the cost itself (a control variate). The first look spends
the text where it matters: a quarter of it for all layers, half for the better half of them, all for the better
quarter (successive halving, Karnin et al. 2013). Similarities propose whole plans beside that one, and the best by
loss goes on. Passes that are left go into swaps, as in sequential floating search (Pudil et al. 1994): a layer comes
back and another goes, if that lowers the loss of the whole text.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mpruner_dist.planning.clusters import Floats
from mpruner_dist.planning.losses import Losses
from mpruner_dist.planning.proposals import Proposal

CONTENDERS, FINALISTS = 4, 2
"""Layers of lowest cost that are looked at on a quarter of the text, and on all of it, before one of them goes."""
PROMISED = 1.5
"""Passes that each layer still to go is promised while those before it are looked at."""


def search(
    losses: Losses,
    free: Sequence[int],
    is_met: Callable[[list[int]], bool],
    passes: float,
    proposals: Iterable[list[int]] = (),
) -> Proposal:
    """Find layers whose removal leaves the loss low.

    Args:
        losses: of plans on text.
        free: the layers that may go.
        is_met: whether enough layers are gone.
        passes: at most so many are spent, if they are enough for the whole model and one plan.
        proposals: other plans that meet the budget, by the layers that they remove; the most promising first.

    Raises:
        StageFailure: the plan breaks the model.
    """
    found = Search(losses, free, passes)
    found.first_look()
    while not is_met(found.dropped):
        found.remove_cheapest(is_met)
    found.take_best_of(proposals)
    found.swap(is_met)
    losses.require_finite([found.dropped])
    costs = {layer: found.cost(layer) for layer in found.dropped}
    return Proposal(
        found.dropped,
        {layer: {"cost": cost} if np.isfinite(cost) else "not measured by itself" for layer, cost in costs.items()},
    )


class Search:
    """The layers that are gone, and what is known of the cost of each layer that is or could be.

    The cost of a layer is the rise of the loss, in nats a token, when it goes and the other layers that are gone stay
    gone. It is kept for each batch as last measured, NaN where it never was.
    """

    def __init__(self, losses: Losses, free: Sequence[int], passes: float) -> None:
        self.losses, self.free, self.limit = losses, list(free), passes
        self.dropped: list[int] = []
        self.cost_B: dict[int, Floats] = {layer: np.full(len(losses.batches), np.nan) for layer in free}
        self.fresh: dict[int, set[int]] = {layer: set() for layer in free}
        """Batches on which a layer's cost was measured since other layers went or came back."""
        self.whole = list(losses.batches)
        self.half, self.quarter = (self.whole[: -(-len(self.whole) // share)] for share in (2, 4))
        self.reserve = 1.0
        """Passes held back to measure the plan that is found."""
        losses.loss([])

    def cost(self, layer: int) -> float:
        """The mean cost of a layer over the batches on which it was measured; infinite if there are none."""
        cost_B, known = self.cost_B[layer], ~np.isnan(self.cost_B[layer])
        return float(np.average(cost_B[known], weights=self.losses.tokens_B[known])) if known.any() else np.inf

    def first_look(self) -> None:
        """Measure the cost of every layer alone, the cheaper ones on more of the text."""
        layers = self.free
        for batches in (self.quarter, self.half, self.whole):
            self.look_at(layers, batches)
            layers = sorted(layers, key=self.cost)[: -(-len(layers) // 2)]

    def remove_cheapest(self, is_met: Callable[[list[int]], bool]) -> None:
        """Remove the layer of least cost, and look at its neighbours: their costs change most."""
        order = [*self.dropped, *sorted(self._there(), key=self.cost)]
        to_go = next(count for count in range(len(order) + 1) if is_met(order[:count])) - len(self.dropped)
        self.reserve = 1.0 + PROMISED * (to_go - 1)
        layer = self.cheapest()
        self._change([*self.dropped, layer])
        left = [other for other in range(self.losses.depth) if other not in self.dropped]
        near = [*[other for other in left if other < layer][-1:], *[other for other in left if other > layer][:1]]
        self.look_at([other for other in near if other in self.cost_B], self.quarter)

    def cheapest(self) -> int:
        """The layer of least cost among those that are there, looked at again until that no longer changes."""
        while True:
            order = sorted(self._there(), key=self.cost)
            for contenders, batches in ((CONTENDERS, self.quarter), (FINALISTS, self.whole)):
                stale = [layer for layer in order[:contenders] if not self.fresh[layer].issuperset(batches)]
                if stale:
                    break
            if not stale or not self.look_at(stale, batches):
                return order[0]

    def look_at(self, layers: list[int], batches: list[int]) -> bool:
        """Measure the cost of layers on some batches, if the passes suffice; say whether they did.

        On batches where it was measured earlier and is not now, it is taken to have changed as much as on these.
        """
        gone = [{*self.dropped, layer} for layer in layers]
        there = [plan - {layer} for plan, layer in zip(gone, layers, strict=True)]
        if not layers or not self._affordable([*gone, *there], batches):
            return False
        self.losses.measure([*gone, *there], batches)  # all at once, so that they can be measured side by side
        with np.errstate(invalid="ignore"):
            rise = self.losses.measure(gone, batches) - self.losses.measure(there, batches)
        rise[np.isnan(rise)] = np.inf  # of two broken plans
        for layer, row in zip(layers, rise, strict=True):
            before_B = self.cost_B[layer]
            seen = np.isfinite(row) & np.isfinite(before_B[batches])
            after_B = before_B + ((row[seen] - before_B[batches][seen]).mean() if seen.any() else 0.0)
            measured = [batch for batch in self.fresh[layer] if batch not in batches]
            after_B[measured] = before_B[measured]
            after_B[batches] = row
            self.cost_B[layer] = after_B
            self.fresh[layer] |= set(batches)
        return True

    def take_best_of(self, proposals: Iterable[list[int]]) -> None:
        """Go on from the proposal with the lowest loss on the whole text, if that is lower than what was found.

        One that is worse on a quarter of the text is not measured on all of it.
        """
        self.losses.loss(self.dropped)
        self.reserve = 0.0
        for plan in proposals:
            if all(
                self._affordable([plan], batches) and self._is_better(plan, batches)
                for batches in (self.quarter, self.whole)
            ):
                self._change(plan)

    def _is_better(self, plan: list[int], batches: list[int]) -> bool:
        other_B, own_B = self.losses.measure([plan, self.dropped], batches)
        return bool(other_B @ self.losses.tokens_B[batches] < own_B @ self.losses.tokens_B[batches])

    def swap(self, is_met: Callable[[list[int]], bool]) -> None:
        """Give a layer back and remove another, the most promising two first, while passes are left."""
        tried: set[tuple[int, ...]] = set()
        while self._there():
            self.look_at([layer for layer in self.dropped if not self.fresh[layer]], self.quarter)
            self.cheapest()
            pairs = [(back, layer) for back in self.dropped for layer in self._there()]
            pairs.sort(key=lambda pair: self.cost(pair[1]) - self.cost(pair[0]))
            plans = ([*(one for one in self.dropped if one != back), layer] for back, layer in pairs)
            plan = next((plan for plan in plans if tuple(sorted(plan)) not in tried and is_met(plan)), None)
            if plan is None or not self._affordable([plan], self.whole):
                return
            tried.add(tuple(sorted(plan)))
            if self.losses.loss(plan) < self.losses.loss(self.dropped):
                self._change(plan)

    def _there(self) -> list[int]:
        return [layer for layer in self.free if layer not in self.dropped]

    def _change(self, dropped: list[int]) -> None:
        self.dropped = dropped
        self.fresh = {layer: set() for layer in self.free}

    def _affordable(self, plans: Iterable[Iterable[int]], batches: list[int]) -> bool:
        return self.losses.passes + self.losses.price(plans, batches) + self.reserve <= self.limit
