"""How many layers must go. L layers."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mpruner_dist.config import PlanConfig
from mpruner_dist.errors import NoneFits, UserError
from mpruner_dist.plan import read_plan
from mpruner_dist.planning.proposals import Proposal


def protected_layers(stacks: Sequence[int], config: PlanConfig) -> set[int]:
    """The layers that never go: the first and last of each stack, as many as the configuration protects.

    Of several stacks the first of each stays in any case: none may end up empty, and in a CNN it changes the shape.
    """
    first_stays = int(len(stacks) > 1)
    protected: set[int] = set()
    begin = 0
    for depth in stacks:
        layers = range(begin, begin + depth)
        begin += depth
        protected |= {*layers[: max(config.protect_first, first_stays)], *layers[max(depth - config.protect_last, 0) :]}
    return protected


def require_budget(config: PlanConfig, stacks: Sequence[int], parameters: Sequence[int], other_parameters: int) -> None:
    """Refuse a budget, or a plan in a file, that no similarities could meet.

    Args:
        config: what is asked for.
        stacks: how many layers are in each stack.
        parameters: of each layer.
        other_parameters: of the model outside its layers.

    Raises:
        UserError: it asks for more layers than there are, for fewer than must stay, or for no change.
    """
    if config.method == "file":
        read_plan(config.file or Path(), sum(stacks))
    elif config.keep_layers is not None or config.target_parameters is not None:
        budget = Budget(config, stacks, parameters, other_parameters)
        if budget.is_met([]):
            asked = "keep_layers" if config.keep_layers is not None else "target_parameters"
            raise UserError(
                f"plan.{asked} {getattr(config, asked)}: the model has {budget.depth} layers and "
                f"{budget.left([])} parameters, so that none would go"
            )
        budget.free()


class Budget:
    """`keep_layers` or `target_parameters` of a configuration, for a model of L layers.

    Args:
        config: has one of the two.
        stacks: how many of the layers are in each stack.
        parameters: of each layer; needed for `target_parameters`.
        other_parameters: of the model outside its layers.

    Raises:
        UserError: so many layers cannot stay.
    """

    def __init__(
        self,
        config: PlanConfig,
        stacks: Sequence[int],
        parameters: Sequence[int] | None = None,
        other_parameters: int = 0,
    ) -> None:
        self.config, self.depth = config, sum(stacks)
        self.protected = protected_layers(stacks, config)
        depth = self.depth
        self.most = depth - max(len(self.protected), 1)
        """Layers that can go: one always stays."""
        self.sizes, self.other = parameters or [], other_parameters
        keep = config.keep_layers
        if keep is not None and keep > depth:
            raise UserError(f"plan.keep_layers: {keep} layers cannot be kept of {depth}")
        if keep is not None and keep < len(self.protected):
            raise UserError(
                f"plan.keep_layers: keeping {keep} layers would remove one of the protected {sorted(self.protected)}"
            )

    def is_met(self, dropped: list[int]) -> bool:
        """Whether enough layers go."""
        if self.config.keep_layers is not None:
            return self.depth - len(dropped) <= self.config.keep_layers
        return self.left(dropped) <= (self.config.target_parameters or 0)

    def free(self) -> list[int]:
        """The layers that may go.

        Raises:
            UserError: without all of them but one that always stays the model is still too large.
        """
        free = [layer for layer in range(self.depth) if layer not in self.protected]
        least = sorted(free, key=lambda layer: self.sizes[layer] if self.sizes else 0)[len(free) - self.most :]
        if not self.is_met(least):
            raise self.missed(least)
        return free

    def least(self) -> int:
        """The fewest layers that meet the budget, if the largest went.

        Raises:
            UserError: none do.
        """
        largest = sorted(self.free(), key=lambda layer: -self.sizes[layer] if self.sizes else 0)
        return next(count for count in range(self.most + 1) if self.is_met(largest[:count]))

    def left(self, dropped: list[int]) -> int:
        """Parameters of the model without these layers."""
        return self.other + sum(size for layer, size in enumerate(self.sizes) if layer not in dropped)

    def fewest(self, propose: Callable[[int], Proposal]) -> Proposal:
        """The proposal that removes fewest layers and meets the budget; `propose` is told how many must go.

        Raises:
            UserError: there is none.
        """
        keep = self.config.keep_layers
        proposal, none = Proposal([], {}), None
        for remove in range(self.most + 1) if keep is None else [self.depth - keep]:
            try:
                proposal = propose(remove)
            except ValueError as error:
                if keep is not None:
                    raise NoneFits(f"plan.keep_layers: {error}") from error
                break  # nor can more go
            except NoneFits as error:
                if keep is not None:
                    raise
                none = error
                continue
            if self.is_met(proposal.dropped):
                return proposal
        raise self.missed(proposal.dropped) if proposal.dropped or none is None else none

    def missed(self, dropped: list[int]) -> UserError:
        """What to say where no more than these layers can go, and that is not enough."""
        return UserError(
            f"plan.target_parameters {self.config.target_parameters:,} cannot be met: with {self.depth - len(dropped)} "
            f"of {self.depth} layers the model still has {self.left(dropped):,} parameters"
        )
