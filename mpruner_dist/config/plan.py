"""The section `plan`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mpruner_dist.config.base import NonNegative, Positive, Section

CLUSTERED = ("anchor", "chain", "complete")
"""Methods that make clusters of layers by a threshold."""
JUDGED = ("greedy", "search")
"""Methods that measure the loss of plans on validation text."""

Method = Literal[
    "anchor", "chain", "complete", "partition", "influence", "angular", "last", "random", "greedy", "search", "file"
]


class PlanConfig(Section):
    """Which layers go. Every method but `file` leaves the first and last layers that are protected alone."""

    method: Method = "anchor"
    """anchor: a cluster grows while the next layer is like its first, as MPruner publishes it. chain: like its last.
    complete: like all of it. partition: the division into clusters that loses least CKA. influence: the lowest block
    influence. angular: the window of layers that turns the states least. last: the last ones. random: drawn by `seed`.
    greedy: one after another the layer whose removal costs the least loss on validation text, all measured anew each
    time. search: the same aim within `passes`. file: as given."""
    keep: Literal["first", "last", "medoid"] = "first"
    """Which layer stands for its cluster and stays; the medoid is most like the rest. Of methods anchor, chain and
    complete."""
    measure: Literal["states", "updates"] = "states"
    """Whose CKA: of the states that blocks hand on, or of their updates of them."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.98
    """CKA from which on layers share a cluster; used by the methods of clusters in rounds, and without a budget."""
    stride: Annotated[int, Field(ge=1, le=3)] = 1
    """Of a cluster's layers 0, 1, 2, ... every stride-th after the one that stays is removed."""
    keep_layers: Positive | None = None
    """The budget: so many layers stay. Methods of clusters then take the highest threshold that suffices. In rounds
    it is where they end."""
    target_parameters: Positive | None = None
    """The budget: as few layers go as leave at most so many parameters."""
    protect_first: NonNegative = 1
    protect_last: NonNegative = 1
    """So many of the first and last layers of each stack stay. Of several stacks, such as an encoder and a decoder or
    the stages of a CNN, the first layer of each stays in any case."""
    preserve_pattern: bool = False
    """Only plans after which serving engines that know a layer's kind by its number are right, see mpruner verify; and
    of families that know it so themselves, as Swin does, only plans that can be written."""
    seed: int = 0
    """Of method random."""
    passes: Annotated[int, Field(ge=4)] = 64
    """Of method search: at most so many forward passes of the whole model over the text that plans are judged on."""
    judge_blocks: Positive | None = None
    """So many sequences of the validation part to judge plans on; None takes all that the run has of it."""
    file: Path | None = None
    """Of method file: a plan.json, of which `num_layers` and `kept` suffice."""

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> Self:
        problems = [*self._of_the_budget(), *self._of_the_method()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _of_the_budget(self) -> list[str]:
        budgets = [name for name in ("keep_layers", "target_parameters") if getattr(self, name) is not None]
        if self.method == "file":
            return [f"{name} is a budget, and method file takes the plan as given: leave it out" for name in budgets]
        if len(budgets) == 2 or (not budgets and self.method not in CLUSTERED):
            return [f"method {self.method} needs keep_layers or target_parameters, and just one of them"]
        if budgets and self.stride != 1:
            return [f"stride {self.stride} goes with threshold; with {budgets[0]} it must be 1"]
        return []

    def _of_the_method(self) -> list[str]:
        problems = []
        if (self.method == "file") != (self.file is not None):
            problems.append("method file and plan.file go together: give both or neither")
        if self.method == "file" and self.preserve_pattern:
            problems.append("preserve_pattern changes a plan, method file takes it as given: choose one")
        if self.method in JUDGED and self.preserve_pattern:
            problems.append(f"preserve_pattern changes a plan after method {self.method} has judged it: choose one")
        if self.keep != "first" and self.method not in CLUSTERED:
            problems.append(f"keep {self.keep} goes with the methods {', '.join(CLUSTERED)}, not {self.method}")
        if self.keep == "medoid" and self.stride != 1:
            problems.append(f"stride {self.stride} counts from an end of a cluster: keep must be first or last")
        return problems
