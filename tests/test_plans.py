"""Every method that needs no model: what it must remove, and what it may not."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpruner_dist.config import PlanConfig
from mpruner_dist.errors import NoneFits, StageFailure, UserError
from mpruner_dist.planning.clusters import (
    CLUSTERINGS,
    chain_clusters,
    clusters_for,
    complete_clusters,
    representative_first,
)
from mpruner_dist.planning.greedy import greedy
from mpruner_dist.planning.losses import Kept, Losses
from mpruner_dist.planning.planner import make_plan
from mpruner_dist.planning.ranking import nearest_window

Floats = npt.NDArray[np.float64]
TOKENS = [30, 10, 20]


def random_cka(seed: int, depth: int) -> Floats:
    half = np.random.default_rng(seed).uniform(0, 1, (depth, depth))
    cka = (half + half.T) / 2
    np.fill_diagonal(cka, 1.0)
    return cka


def plan_by(method: str, depth: int = 8, seed: int = 0, **changes: Any) -> Any:
    cka = random_cka(seed, depth)
    angles = 1 - random_cka(seed, depth + 1)
    config = PlanConfig(**{"method": method} | changes)
    influence = np.random.default_rng(seed).uniform(size=depth)
    return make_plan(cka, config, influence=influence, angular=angles, losses=some_losses(depth, seed))


def some_losses(depth: int, seed: int = 0, asked: list[tuple[Kept, int]] | None = None) -> Losses:
    """Each layer has a cost of its own, more of it the more layers are gone, and each two that go a common one."""
    draw = np.random.default_rng(seed)
    cost_BL, common_LL = draw.uniform(0.1, 1, (len(TOKENS), depth)), draw.normal(0, 0.05, (depth, depth))

    def judge(pairs: list[tuple[Kept, int]]) -> list[float]:
        if asked is not None:
            asked.extend(pairs)
        found = []
        for kept, batch in pairs:
            gone = [layer for layer in range(depth) if layer not in kept]
            loss = 2 + cost_BL[batch, gone].sum() * (1 + 0.05 * len(gone)) + common_LL[np.ix_(gone, gone)].sum()
            found.append(loss * TOKENS[batch])
        return found

    return Losses(judge, TOKENS, depth)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 9), st.floats(0.2, 0.9))
def test_chains_break_just_where_neighbours_differ(seed: int, depth: int, threshold: float) -> None:
    cka = random_cka(seed, depth)
    clusters = chain_clusters(cka, threshold)
    assert [layer for cluster in clusters for layer in cluster] == list(range(depth))
    begins = {cluster[0] for cluster in clusters}
    for layer in range(1, depth):
        assert (layer in begins) == (cka[layer - 1, layer] < threshold)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 9), st.floats(0.2, 0.9))
def test_in_a_complete_cluster_all_are_alike_and_no_two_could_be_one(seed: int, depth: int, threshold: float) -> None:
    cka = random_cka(seed, depth)
    clusters = complete_clusters(cka, threshold)
    assert [layer for cluster in clusters for layer in cluster] == list(range(depth))
    assert all(cka[np.ix_(cluster, cluster)].min() >= threshold for cluster in clusters)
    for one, other in itertools.pairwise(clusters):
        assert cka[np.ix_(one, other)].min() < threshold


def test_complete_linkage_joins_the_nearest_first() -> None:
    cka = np.eye(4)
    for (one, other), value in {(0, 1): 0.8, (1, 2): 0.9, (2, 3): 0.8, (0, 2): 0.7, (1, 3): 0.6, (0, 3): 0.1}.items():
        cka[one, other] = cka[other, one] = value
    assert complete_clusters(cka, 0.85) == [[0], [1, 2], [3]]
    assert complete_clusters(cka, 0.65) == [[0, 1, 2], [3]]  # 0 joins 1 and 2 at 0.7, 3 would at 0.6
    assert complete_clusters(cka, 0.75) == [[0], [1, 2], [3]]  # a chain would be one cluster
    assert chain_clusters(cka, 0.75) == [[0, 1, 2, 3]]


def test_who_stands_for_a_cluster() -> None:
    cka = np.eye(4)
    cka[1, 2] = cka[2, 1] = cka[2, 3] = cka[3, 2] = 0.9
    assert representative_first([1, 2, 3], cka, "first") == [1, 2, 3]
    assert representative_first([1, 2, 3], cka, "last") == [3, 2, 1]
    assert representative_first([1, 2, 3], cka, "medoid") == [2, 1, 3]


@settings(max_examples=80)
@given(st.data(), st.sampled_from(sorted(CLUSTERINGS)), st.sampled_from(["first", "last", "medoid"]))
def test_clusters_meet_a_budget_at_the_highest_threshold(data: st.DataObject, method: str, keep: Any) -> None:
    depth, seed = data.draw(st.integers(4, 8)), data.draw(st.integers(0, 10_000))
    cka, protected = random_cka(seed, depth), {0, depth - 1}
    remove = data.draw(st.integers(1, depth - 3))
    clusters, dropped = clusters_for(CLUSTERINGS[method], cka, remove, protected, keep)
    assert len(set(dropped)) == remove
    like = {layer: cluster[0] for cluster in clusters for layer in cluster}
    could = [layer for layer in range(depth) if like[layer] != layer and layer not in protected]
    assert set(dropped) <= set(could)
    assert all(cka[like[a], a] >= cka[like[b], b] for a in dropped for b in set(could) - set(dropped))
    # at the least similar of these thresholds all higher ones let fewer go
    for threshold in np.unique(cka[np.triu_indices(depth, 1)])[::-1]:
        grown = [representative_first(cluster, cka, keep) for cluster in CLUSTERINGS[method](cka, threshold)]
        if sorted(map(sorted, grown)) == sorted(map(sorted, clusters)):
            break
        assert sum(layer not in protected for cluster in grown for layer in cluster[1:]) < remove


def test_clusters_that_cannot_meet_a_budget() -> None:
    cka = np.full((5, 5), 0.5)
    cka[2] = cka[:, 2] = 0.9  # it would stand for all, and stay beside the protected first and last
    with pytest.raises(UserError, match=r"plan\.keep_layers: no threshold makes clusters that let 3 of 5 layers go"):
        make_plan(cka, PlanConfig(method="chain", keep="medoid", keep_layers=2))
    assert make_plan(cka, PlanConfig(method="chain", keep="medoid", keep_layers=3)).dropped == [1, 3]


def test_keeping_the_last_of_the_published_clusters() -> None:
    cka = np.eye(6)
    cka[1:5, 1:5] = 0.99
    assert make_plan(cka, PlanConfig(threshold=0.98)).dropped == [2, 3, 4]
    assert make_plan(cka, PlanConfig(threshold=0.98, keep="last")).dropped == [1, 2, 3]
    assert make_plan(cka, PlanConfig(threshold=0.98, keep="last", stride=2)).dropped == [1, 3]
    plan = make_plan(cka, PlanConfig(threshold=0.98, keep="last"))
    assert plan.reasons["1"] == {"like": 4, "cka": 0.99}
    assert plan.clusters == [[0], [1, 2, 3, 4], [5]]


def test_a_standard_error_that_is_not_known_is_not_told() -> None:
    cka, stderr = np.eye(4), np.full((4, 4), 0.01)
    cka[1:3, 1:3] = 0.99
    stderr[1, 2] = stderr[2, 1] = np.nan
    plan = make_plan(cka, PlanConfig(threshold=0.98), stderr=stderr)
    assert plan.reasons == {"2": {"like": 1, "cka": 0.99}}


def test_influence_takes_the_lowest_and_says_so() -> None:
    influence = [0.0, 0.3, 0.1, 0.2, 0.4, 0.0]
    plan = make_plan(random_cka(0, 6), PlanConfig(method="influence", keep_layers=4), influence=influence)
    assert plan.dropped == [2, 3]
    assert plan.reasons == {"2": {"block_influence": 0.1}, "3": {"block_influence": 0.2}}
    with pytest.raises(UserError, match="needs the block influence of every layer"):
        make_plan(random_cka(0, 6), PlanConfig(method="influence", keep_layers=4), influence=[*influence[:5], None])


def test_the_angular_window_turns_the_states_least() -> None:
    angles = np.full((7, 7), 0.5)
    angles[0, 2] = angles[4, 6] = 0.0  # of windows with a protected layer
    angles[2, 4] = 0.1
    config = PlanConfig(method="angular", keep_layers=4)
    plan = make_plan(random_cka(0, 6), config, angular=angles)
    assert plan.dropped == [2, 3]
    assert plan.reasons["3"] == {"angular_distance_of_the_window": 0.1}
    assert nearest_window(angles, 0, set()) == []
    angles[2, 5] = np.nan
    with pytest.raises(NoneFits, match=r"keep_layers: no 3 consecutive layers with a known distance go without"):
        make_plan(random_cka(0, 6), config.model_copy(update={"keep_layers": 3, "protect_first": 2}), angular=angles)
    with pytest.raises(UserError, match="needs the angular distances"):
        make_plan(random_cka(0, 6), config)


def test_the_last_and_the_drawn() -> None:
    assert plan_by("last", keep_layers=5, protect_last=2).dropped == [3, 4, 5]
    drawn = [plan_by("random", keep_layers=keep, seed=3).dropped for keep in (6, 4)]
    assert set(drawn[0]) < set(drawn[1])
    assert len({tuple(make_plan(random_cka(0, 8), PlanConfig(method="random", keep_layers=4, seed=seed)).dropped)
                for seed in range(9)}) > 1  # fmt: skip


@settings(max_examples=150)
@given(
    st.data(),
    st.sampled_from(["anchor", "chain", "complete", "partition", "influence", "last", "random", "greedy"]),
    st.integers(0, 1000),
)
def test_every_method_meets_the_budget_and_leaves_the_protected_alone(
    data: st.DataObject, method: str, seed: int
) -> None:
    depth = data.draw(st.integers(4, 8))
    first, last = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 1))
    keep = data.draw(st.integers(first + last, depth))
    plan = plan_by(method, depth, seed, keep_layers=keep, protect_first=first, protect_last=last)
    assert len(plan.kept) == keep
    assert {*range(first), *range(depth - last, depth)} <= set(plan.kept)
    assert set(plan.reasons) == {str(layer) for layer in plan.dropped}


def test_parameters_count_for_every_method() -> None:
    config = PlanConfig(method="influence", target_parameters=130)
    sizes, influence = [20, 10, 40, 10, 20], [0, 0.3, 0.2, 0.1, 0]
    for target, dropped in ((130, []), (129, [3]), (119, [2, 3])):
        given = config.model_copy(update={"target_parameters": target})
        made = make_plan(random_cka(0, 5), given, influence=influence, parameters=sizes, other_parameters=30)
        assert made.dropped == dropped
    with pytest.raises(UserError, match=r"60 cannot be met: with 2 of 5 layers the model still has 70 parameters"):
        make_plan(
            random_cka(0, 5), config.model_copy(update={"target_parameters": 60, "method": "greedy"}),
            losses=some_losses(5), parameters=sizes, other_parameters=30,
        )  # fmt: skip


@pytest.mark.parametrize("method", ["greedy", "search"])
def test_one_layer_stays_even_where_another_was_to(method: str) -> None:
    """The first, which alone is small enough, costs least."""
    config = PlanConfig(method=method, target_parameters=15, protect_first=0, protect_last=0)
    losses = Losses(lambda pairs: [float(0 in kept) + 1 for kept, _ in pairs], TOKENS, 4)
    with pytest.raises(UserError, match="15 cannot be met: with 1 of 4 layers the model still has 40 parameters"):
        make_plan(random_cka(0, 4), config, losses=losses, parameters=[10, 40, 40, 40], other_parameters=0)


def test_greedy_takes_the_least_loss_at_each_step_and_tells_it() -> None:
    asked: list[tuple[Kept, int]] = []
    losses = some_losses(7, asked=asked)
    plan = make_plan(random_cka(0, 7), PlanConfig(method="greedy", keep_layers=4), losses=losses)
    reference, gone = some_losses(7), []
    for _ in range(3):
        gone.append(min((x for x in range(1, 6) if x not in gone), key=lambda x: reference.loss([*gone, x])))
    assert plan.dropped == sorted(gone)
    for step, layer in enumerate(gone):
        reason = plan.reasons[str(layer)]
        assert reason["step"] == step + 1
        assert reason["loss_before"] == pytest.approx(reference.loss(gone[:step]))
        assert reason["loss_after"] == pytest.approx(reference.loss(gone[: step + 1]))
    assert plan.judged is not None
    assert plan.judged["passes"] == pytest.approx(5 + 4 + 3 + 1)  # and the whole model
    assert plan.judged["tokens"] == sum(TOKENS)
    assert plan.judged["loss"] == pytest.approx(reference.loss(gone))
    assert len(asked) == len(set(asked)) == 13 * len(TOKENS)  # nothing twice


def test_a_part_of_the_text_is_a_part_of_a_pass() -> None:
    losses = some_losses(4)
    assert losses.measure([[1], [2]], [0]).shape == (2, 1)
    assert losses.passes == pytest.approx(2 * 30 / 60)
    losses.loss([1])
    assert losses.passes == pytest.approx(2 * 30 / 60 + 30 / 60)
    assert losses.loss([1]) == pytest.approx(float(losses.measure([[1]], [0, 1, 2])[0] @ TOKENS) / 60)


def test_losses_that_are_no_numbers() -> None:
    def judge(pairs: list[tuple[Kept, int]]) -> list[float]:
        return [float("nan") if len(kept) < 4 else 1.0 for kept, _ in pairs]

    with pytest.raises(StageFailure, match=r"without layers \[1\] the model's loss is not finite: keep more layers"):
        greedy(Losses(judge, TOKENS, 4), [1, 2], lambda dropped: len(dropped) == 1)
    with pytest.raises(StageFailure, match="the model's loss on the validation text is not finite"):
        Losses(lambda pairs: [float("inf")] * len(pairs), TOKENS, 4).loss([])
    with pytest.raises(UserError, match="method greedy needs the losses of plans"):
        make_plan(random_cka(0, 4), PlanConfig(method="greedy", keep_layers=3))
