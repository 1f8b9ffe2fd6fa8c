"""From similarities, and for some methods losses, to a plan. No torch, no processes; L layers, S = L + 1 states."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpruner_dist.config import PlanConfig
from mpruner_dist.config.plan import JUDGED
from mpruner_dist.errors import NoneFits, UserError
from mpruner_dist.plan import Plan, by_stack, nearest_matching, read_plan
from mpruner_dist.planning.budget import Budget, protected_layers
from mpruner_dist.planning.clusters import apart, stack_starts
from mpruner_dist.planning.greedy import greedy
from mpruner_dist.planning.losses import Losses
from mpruner_dist.planning.proposals import Proposal, Similarities, propose, propose_by_threshold
from mpruner_dist.planning.search import search

Matrix = Sequence[Sequence[float]] | Any
PROPOSERS = ("influence", "partition", "angular")
"""Methods whose plans a search looks at beside its own, the most promising first."""
INSTEAD = "another layer takes its place, so that the kinds keep their pattern"
Pattern = tuple[Sequence[Hashable], Sequence[Hashable]]


def make_plan(
    cka: Matrix,
    config: PlanConfig,
    *,
    stderr: Matrix | None = None,
    influence: Sequence[float] | None = None,
    angular: Matrix | None = None,
    losses: Losses | None = None,
    parameters: Sequence[int] | None = None,
    other_parameters: int = 0,
    pattern: Pattern | None = None,
    at_least: int = 1,
    stacks: Sequence[int] = (),
) -> Plan:
    """Decide which layers go.

    Args:
        cka: similarity [L, L] of the layers.
        config: method, threshold, budget, protection.
        stderr: standard errors [L, L] of `cka`, told among the reasons; None if unknown.
        influence: block influence [L]; needed by method influence, a help to method search.
        angular: angular distance [S, S] of the states around the layers; needed by method angular, a help to search.
        losses: of plans on text; needed by the methods greedy and search.
        parameters: of each layer; needed for `target_parameters`.
        other_parameters: of the model outside its layers.
        pattern: of each layer its kind, and of each place, counted through the stacks, the kind that must stand there;
            None asks for none.
        at_least: so many layers stay, even where a threshold lets more go.
        stacks: how many of the layers are in each stack, without which there is one: no cluster leaves its stack.

    Raises:
        UserError: the budget, the pattern or the given plan cannot be met, or what the method goes by is unknown.
    """
    cka_LL = np.asarray(cka, np.float64)
    depth = len(cka_LL)
    if config.method == "file":
        return read_plan(config.file or Path(), depth)
    stacks = stacks or [depth]
    measured = Similarities(
        apart(cka_LL, stack_starts(stacks)),
        *(None if some is None else np.asarray(some, np.float64) for some in (stderr, influence, angular)),
    )
    measured.require(config)
    change = partial(_into_pattern, pattern=pattern, stacks=stacks, protected=protected_layers(stacks, config))
    if config.keep_layers is None and config.target_parameters is None:
        proposal = change(_by_threshold(measured, config, stacks, at_least, losses))
    else:
        proposal = _within(Budget(config, stacks, parameters, other_parameters), measured, losses, change)
    return Plan.keeping(
        depth,
        [layer for layer in range(depth) if layer not in proposal.dropped],
        clusters=[sorted(cluster) for cluster in proposal.clusters],
        reasons={str(layer): proposal.reasons[layer] for layer in sorted(proposal.reasons)},
        method=config.method,
        judged=losses.summary(proposal.dropped) if losses and config.method in JUDGED else None,
    )


def judged_plan(losses: Callable[[], Losses], **given: Any) -> dict[str, Any]:
    """`make_plan` as a task of the workers: content of a plan."""
    return make_plan(losses=losses(), **given).model_dump()


def _by_threshold(
    measured: Similarities, config: PlanConfig, stacks: Sequence[int], at_least: int, losses: Losses | None
) -> Proposal:
    proposal = propose_by_threshold(measured, config, protected_layers(stacks, config))
    if len(measured.cka_LL) - len(proposal.dropped) >= at_least:
        return proposal
    # of those, the ones most like what stays
    fewer = config.model_copy(update={"keep_layers": at_least, "stride": 1})
    return _within(Budget(fewer, stacks), measured, losses)


def _within(
    budget: Budget,
    measured: Similarities,
    losses: Losses | None,
    change: Callable[[Proposal], Proposal] = lambda proposal: proposal,
) -> Proposal:
    """The plan that meets the budget; what is proposed is changed by `change` before it is asked whether it does."""
    config = budget.config
    if config.method not in JUDGED:
        return budget.fewest(lambda remove: change(propose(measured, config, budget.protected, remove)))
    if losses is None:
        raise UserError(f"method {config.method} needs the losses of plans, and there is nothing that measures them")
    free = budget.free()
    if config.method == "greedy":
        proposal = greedy(losses, free, budget.is_met)
    else:
        proposal = search(losses, free, budget.is_met, config.passes, _proposals(budget, measured))
    if len(proposal.dropped) > budget.most:  # of layers of several sizes the one that had to stay has gone
        raise budget.missed(proposal.dropped[: budget.most])
    return proposal


def _proposals(budget: Budget, measured: Similarities) -> list[list[int]]:
    """What similarities propose for this budget: those methods that can, by what is known."""
    found = []
    for method in PROPOSERS:
        config = budget.config.model_copy(update={"method": method})
        try:
            measured.require(config)
            proposal = budget.fewest(partial(propose, measured, config, budget.protected))
        except UserError:
            continue  # not measured here, or it cannot remove so many
        found.append(proposal.dropped)
    return found


def _into_pattern(proposal: Proposal, pattern: Pattern | None, stacks: Sequence[int], protected: set[int]) -> Proposal:
    """The proposal with as many layers, in the pattern if there is one.

    Raises:
        NoneFits: so many layers do not keep it.
    """
    if pattern is None:
        return proposal
    layers = range(sum(stacks))
    kept = _nearest([layer for layer in layers if layer not in proposal.dropped], pattern, stacks, protected)
    dropped = [layer for layer in layers if layer not in kept]
    return Proposal(dropped, {layer: proposal.reasons.get(layer, INSTEAD) for layer in dropped}, proposal.clusters)


def _nearest(kept: list[int], pattern: Pattern, stacks: Sequence[int], protected: set[int]) -> list[int]:
    """As many layers of each stack, in the pattern, as many of them as possible among those that were to be kept."""
    have, need = pattern
    found: list[int] = []
    first = 0
    for depth, mine in zip(stacks, by_stack(kept, stacks), strict=True):
        some = nearest_matching(have[first : first + depth], need[first : first + len(mine)], mine)
        if some is None:
            raise NoneFits(f"plan.preserve_pattern: no {len(mine)} layers keep the pattern of kinds; keep more layers")
        found += [first + layer for layer in some]
        first += depth
    lost = sorted(protected - set(found))
    if lost:
        raise NoneFits(
            f"plan.preserve_pattern: the nearest {len(kept)} layers that keep the pattern leave out layers {lost}, "
            "which plan.protect_first and plan.protect_last keep: lower those, or keep another number of layers"
        )
    return found
