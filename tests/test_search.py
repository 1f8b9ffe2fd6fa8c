"""The search: never more passes than it may take, as good as greedy with a third of them, and never fooled."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpruner_dist.config import PlanConfig
from mpruner_dist.errors import StageFailure
from mpruner_dist.planning.greedy import greedy, greedy_passes
from mpruner_dist.planning.losses import Kept, Losses
from mpruner_dist.planning.planner import make_plan
from mpruner_dist.planning.search import search

LAYERS, BATCHES = 24, 8
FREE = range(1, LAYERS - 1)


def costs(seed: int, noise: float = 0.3) -> Callable[[list[int], int], float]:
    """Each layer has a cost, another one in each batch; the more are gone the more; neighbours that go spare some."""
    draw = np.random.default_rng(seed)
    cost_L = draw.uniform(0.1, 1.0, LAYERS)
    cost_BL = cost_L * draw.lognormal(0, noise, (BATCHES, LAYERS))
    spared_L = draw.uniform(0, 0.5, LAYERS)

    def loss(gone: list[int], batch: int) -> float:
        pairs = [layer for layer in gone if layer + 1 in gone]
        return 2 + float(cost_BL[batch, gone].sum() * (1 + 0.02 * len(gone)) - (spared_L * cost_BL[batch])[pairs].sum())

    return loss


def losses_of(loss: Callable[[list[int], int], float]) -> Losses:
    def judge(pairs: list[tuple[Kept, int]]) -> list[float]:
        return [100 * loss([layer for layer in range(LAYERS) if layer not in kept], batch) for kept, batch in pairs]

    return Losses(judge, [100] * BATCHES, LAYERS)


def removing(count: int) -> Callable[[list[int]], bool]:
    return lambda dropped: len(dropped) >= count


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(0, 10), st.integers(4, 90))
def test_it_keeps_to_its_passes_whatever_they_are(seed: int, remove: int, passes: int) -> None:
    losses = losses_of(costs(seed))
    proposal = search(losses, FREE, removing(remove), passes, [list(range(5, 5 + remove))])
    assert losses.passes <= passes + 1e-9
    assert len(set(proposal.dropped)) == remove
    assert set(proposal.dropped) <= set(FREE)
    assert set(proposal.reasons) == set(proposal.dropped)
    spent = losses.passes
    losses.loss(proposal.dropped)
    assert losses.passes == spent  # the plan was measured on the whole text


def test_what_was_never_measured_is_no_number() -> None:
    losses = losses_of(costs(0))
    proposal = search(losses, FREE, removing(4), 2.0, [[3, 7, 11, 15]])  # not even the passes for a look at each layer
    assert "not measured by itself" in proposal.reasons.values()
    json.dumps(proposal.reasons, allow_nan=False)


def test_it_is_as_good_as_greedy_with_a_third_of_its_passes() -> None:
    worse = []
    for seed, remove in itertools.product(range(12), (3, 6, 9)):
        one, other = losses_of(costs(seed)), losses_of(costs(seed))
        best = greedy(one, list(FREE), removing(remove)).dropped
        found = search(other, FREE, removing(remove), greedy_passes(len(FREE), remove) / 3).dropped
        worse.append(other.loss(found) - one.loss(best))
    assert np.mean(worse) < 0.01
    assert max(worse) < 0.15
    assert min(worse) < -0.005  # swaps: greedy is no optimum


def test_enough_passes_find_the_best_of_independent_layers() -> None:
    cost_L = np.random.default_rng(0).uniform(0.1, 1, LAYERS)
    losses = losses_of(lambda gone, _: 2 + float(cost_L[gone].sum()))
    found = search(losses, FREE, removing(5), 40)
    assert sorted(found.dropped) == sorted(sorted(FREE, key=lambda layer: cost_L[layer])[:5])
    assert {layer: reason["cost"] for layer, reason in found.reasons.items()} == pytest.approx(
        {layer: cost_L[layer] for layer in found.dropped}
    )


def test_a_layer_that_its_neighbour_makes_cheap_is_found() -> None:
    """Alone, layer 9 is the dearest; beside 8, the cheapest of all, it costs nothing."""

    def loss(gone: list[int], _: int) -> float:
        alone = {layer: 1.0 + 0.01 * layer for layer in FREE} | {8: 0.5, 9: 9.0}
        return 2 + sum(alone[layer] for layer in gone) - (9.0 if {8, 9} <= set(gone) else 0.0)

    assert set(search(losses_of(loss), FREE, removing(2), 20).dropped) == {8, 9}


def test_the_better_of_its_own_and_the_proposed_plans_goes_on() -> None:
    """Only together are 3, 11 and 19 cheap: nothing that looks at one after another can find that."""

    def loss(gone: list[int], _: int) -> float:
        return 2.0 if set(gone) == {3, 11, 19} else 2 + len(gone) + 0.01 * sum(gone)

    for proposals, expected in (([], {1, 2, 3}), ([[4, 5, 6], [3, 11, 19]], {3, 11, 19})):
        assert set(search(losses_of(loss), FREE, removing(3), 20, proposals).dropped) == expected


def test_a_layer_whose_removal_breaks_the_model_stays() -> None:
    broken = {2, 7, 12}

    def loss(gone: list[int], batch: int) -> float:
        fatal = broken & set(gone) and batch == 1  # on one batch in eight
        return float("nan") if fatal else 2 + sum(0.0 if layer in broken else 1.0 + 0.01 * layer for layer in gone)

    assert not broken & set(search(losses_of(loss), FREE, removing(4), 60).dropped)
    with pytest.raises(StageFailure, match="the model's loss is not finite: keep more layers"):
        search(losses_of(lambda gone, _: 2.0 if not gone else float("inf")), FREE, removing(4), 60)


@pytest.mark.parametrize("measured", [True, False])
def test_a_plan_by_search(measured: bool) -> None:
    """With nothing but the CKA, the proposals are fewer."""
    cka = np.random.default_rng(0).uniform(0, 1, (LAYERS, LAYERS))
    more: dict[str, Any] = {}
    if measured:
        more = {"influence": list(range(LAYERS)), "angular": np.random.default_rng(1).uniform(size=(25, 25))}
    config = PlanConfig(method="search", target_parameters=1_900, passes=30)
    losses = losses_of(costs(1))
    plan = make_plan(cka, config, losses=losses, parameters=[100] * LAYERS, other_parameters=10, **more)
    assert len(plan.dropped) == 6
    assert plan.judged is not None
    assert plan.judged["passes"] <= 30
    assert plan.judged["loss"] == losses.loss(plan.dropped)
    assert plan.judged["loss_of_the_whole_model"] == 2.0
