"""Losses of plans on text, each measured once, and what that costs. B batches of text; no torch, no processes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mpruner_dist.errors import StageFailure
from mpruner_dist.planning.clusters import Floats

Kept = tuple[int, ...]
Judge = Callable[[list[tuple[Kept, int]]], Sequence[float]]
"""From pairs of the layers that a plan keeps and the id of a batch to the negative log-likelihood of each, in nats,
summed over the batch's tokens."""


class Losses:
    """What removing layers does to the loss of a model of `depth` layers.

    One pass is one forward pass of the whole model over the whole text; a part of the text is that part of a pass.

    Args:
        judge: measures.
        tokens: of each batch, [B].
        depth: layers of the model.
    """

    def __init__(self, judge: Judge, tokens: Sequence[int], depth: int) -> None:
        self.judge, self.depth = judge, depth
        self.tokens_B = np.asarray(tokens, np.float64)
        self.known: dict[tuple[Kept, int], float] = {}

    @property
    def batches(self) -> range:
        """Ids of the batches of the whole text."""
        return range(len(self.tokens_B))

    @property
    def passes(self) -> float:
        """Passes so far."""
        return self._passes(batch for _, batch in self.known)

    def price(self, plans: Iterable[Iterable[int]], batches: Iterable[int]) -> float:
        """Passes that `measure` of the same would take."""
        chosen = list(batches)
        pairs = {(self.kept(dropped), batch) for dropped in plans for batch in chosen}
        return self._passes(batch for pair in pairs - self.known.keys() for batch in pair[1:])

    def _passes(self, batches: Iterable[int]) -> float:
        return float(sum(self.tokens_B[batch] for batch in batches) / self.tokens_B.sum())

    def kept(self, dropped: Iterable[int]) -> Kept:
        """The layers that a plan keeps."""
        gone = set(dropped)
        return tuple(layer for layer in range(self.depth) if layer not in gone)

    def measure(self, plans: Iterable[Iterable[int]], batches: Iterable[int]) -> Floats:
        """Loss of plans, given by the layers that they drop, on each of some batches: nats a token, [plans, batches].

        All that is not known yet is handed to the judge at once, so that it can be measured side by side.

        Raises:
            StageFailure: the loss of the whole model is not finite.
        """
        kept, chosen = [self.kept(dropped) for dropped in plans], list(batches)
        pairs = [(plan, batch) for plan in kept for batch in chosen]
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.known]
        if new:
            for (plan, batch), nll in zip(new, self.judge(new), strict=True):
                if len(plan) == self.depth and not np.isfinite(nll):
                    raise StageFailure(
                        "the model's loss on the validation text is not finite: try model.dtype float32 or bfloat16"
                    )
                # a broken plan is as bad as can be, and no number that comparisons stumble over
                self.known[plan, batch] = float(nll) / self.tokens_B[batch] if np.isfinite(nll) else np.inf
        return np.array([self.known[pair] for pair in pairs]).reshape(len(kept), len(chosen))

    def loss(self, dropped: Iterable[int]) -> float:
        """Loss of a plan on the whole text, nats a token."""
        return self.mean(self.measure([dropped], self.batches)[0])

    def mean(self, loss_B: Floats) -> float:
        """Mean over all tokens of the text of the losses of its batches."""
        return float(loss_B @ self.tokens_B / self.tokens_B.sum())

    def require_finite(self, plans: Iterable[list[int]]) -> None:
        """Refuse plans that break the model.

        Raises:
            StageFailure: the loss of one is not finite.
        """
        for dropped in plans:
            if not np.isfinite(self.loss(dropped)):
                raise StageFailure(
                    f"without layers {sorted(dropped)} the model's loss is not finite: keep more layers, or try "
                    "model.dtype float32 or bfloat16"
                )

    def summary(self, dropped: Iterable[int]) -> dict[str, Any]:
        """What a plan says of how it was judged."""
        return {
            "passes": round(self.passes, 3),
            "tokens": int(self.tokens_B.sum()),
            "loss_of_the_whole_model": self.loss([]),
            "loss": self.loss(dropped),
        }
