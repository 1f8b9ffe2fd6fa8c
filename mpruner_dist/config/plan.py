"""The section `plan`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mpruner_dist.config.base import NonNegative, Positive, Section

THRESHOLD_METHODS = ("anchor",)
"""Methods whose clusters follow from `plan.threshold`."""


class PlanConfig(Section):
    """Which layers go."""

    method: Literal["anchor", "partition", "file"] = "anchor"
    """anchor: clusters by threshold, as published. partition: the best clusters for a budget. file: as given."""
    measure: Literal["states", "updates"] = "states"
    """Whose CKA: of the states that blocks hand on, or of their updates of them."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.98
    stride: Annotated[int, Field(ge=1, le=3)] = 1
    """Of a cluster's layers 0, 1, 2, ... every stride-th after the first is removed."""
    keep_layers: Positive | None = None
    target_parameters: Positive | None = None
    protect_first: NonNegative = 1
    protect_last: NonNegative = 1
    preserve_pattern: bool = False
    """Only plans after which serving engines that know a layer's kind by its number are right; see mpruner verify."""
    file: Path | None = None

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> Self:
        budgets = [name for name in ("keep_layers", "target_parameters") if getattr(self, name) is not None]
        if self.method == "partition" and len(budgets) != 1:
            raise ValueError("method partition needs keep_layers or target_parameters, and just one of them")
        if self.method != "partition" and budgets:
            raise ValueError(f"{budgets[0]} is a budget: it goes with method partition, not {self.method}")
        if (self.method == "file") != (self.file is not None):
            raise ValueError("method file and plan.file go together: give both or neither")
        if self.method == "file" and self.preserve_pattern:
            raise ValueError("preserve_pattern changes a plan, method file takes it as given: choose one")
        return self
