"""From similarities and a budget to a plan."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpruner_dist.config import PlanConfig
from mpruner_dist.errors import UserError
from mpruner_dist.planning.planner import make_plan


def near(depth: int, fall: float = 0.01) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Similarity that falls with the distance of two layers."""
    layers = np.arange(depth)
    return 1 - fall * np.abs(layers[:, None] - layers)


def partition(**changes: Any) -> PlanConfig:
    return PlanConfig(**{"method": "partition"} | changes)


def test_anchor_plan_with_its_reasons() -> None:
    cka, stderr = near(8), near(8, 0.1) / 100
    plan = make_plan(cka, PlanConfig(threshold=0.975, protect_first=1, protect_last=1), stderr=stderr)
    assert plan.clusters == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert plan.dropped == [1, 2, 4, 5]  # 7 is the last: protected
    assert plan.kept == [0, 3, 6, 7]
    assert (plan.num_layers, plan.method) == (8, "anchor")
    assert set(plan.reasons) == {"1", "2", "4", "5"}
    assert plan.reasons["5"] == {"like": 3, "cka": cka[3, 5], "stderr": stderr[3, 5]}
    assert "stderr" not in make_plan(cka, PlanConfig(threshold=0.975)).reasons["5"]


def test_anchor_with_strides_and_protection() -> None:
    def dropped(**changes: Any) -> list[int]:
        return make_plan(near(8, 0.001), PlanConfig(threshold=0.9, **changes)).dropped

    assert dropped(protect_first=0, protect_last=0) == [1, 2, 3, 4, 5, 6, 7]
    assert dropped(protect_first=0, protect_last=0, stride=2) == [1, 3, 5, 7]
    assert dropped(protect_first=0, protect_last=0, stride=3) == [1, 4, 7]
    assert dropped(protect_first=3, protect_last=2, stride=1) == [3, 4, 5]
    assert dropped(protect_first=20, protect_last=20) == []


def test_a_plain_list_is_a_matrix() -> None:
    assert (
        make_plan(near(5).tolist(), partition(keep_layers=4)).kept == make_plan(near(5), partition(keep_layers=4)).kept
    )


@settings(max_examples=80)
@given(st.data(), st.integers(2, 9), st.integers(0, 2**31))
def test_a_budget_of_layers_is_met_and_protection_holds(data: st.DataObject, depth: int, seed: int) -> None:
    half = np.random.default_rng(seed).uniform(0, 1, (depth, depth))
    cka = (half + half.T) / 2
    first, last = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    protected = {*range(min(first, depth)), *range(max(0, depth - last), depth)}
    least = len(protected | {0})  # the first cluster begins at layer 0
    keep = data.draw(st.integers(least, depth))
    plan = make_plan(cka, partition(keep_layers=keep, protect_first=first, protect_last=last))
    assert len(plan.kept) == keep
    assert protected <= set(plan.kept)
    assert plan.kept == [cluster[0] for cluster in plan.clusters]
    found = sum(1 - plan.reasons[str(layer)]["cka"] for layer in plan.dropped)
    best = min(
        sum(1 - cka[max(k for k in kept if k <= layer), layer] for layer in range(depth) if layer not in kept)
        for kept in itertools.combinations(range(depth), keep)
        if kept[0] == 0 and protected <= set(kept)
    )
    assert found == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (9, r"plan\.keep_layers: 9 layers cannot be kept of 8"),
        (3, r"plan\.keep_layers: keeping 3 layers would remove one of the protected \[0, 1, 6, 7\]"),
    ],
)
def test_an_impossible_number_of_layers_is_the_users_mistake(keep: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(near(8), partition(keep_layers=keep, protect_first=2, protect_last=2))


def test_a_budget_of_parameters_removes_as_few_layers_as_it_can() -> None:
    def kept(target: int) -> int:
        config = partition(target_parameters=target)
        return len(make_plan(near(6), config, parameters=[100] * 6, other_parameters=50).kept)

    assert kept(10_000) == 6
    assert kept(650) == 6
    assert kept(649) == 5
    assert kept(450) == 4
    assert kept(250) == 2


def test_a_budget_of_parameters_counts_layers_of_unequal_size() -> None:
    cka = near(5)
    sizes = [10, 10, 1000, 10, 10]
    cka[1, 2] = cka[2, 1] = 0.5  # the big layer resembles nothing: it goes last
    plan = make_plan(cka, partition(target_parameters=100), parameters=sizes)
    assert sum(sizes[layer] for layer in plan.kept) <= 100
    assert 2 in plan.dropped
    for keep in range(len(plan.kept) + 1, 6):  # every plan with more layers is too big
        more = make_plan(cka, partition(keep_layers=keep))
        assert sum(sizes[layer] for layer in more.kept) > 100


def test_a_budget_of_parameters_is_met_in_the_pattern_too() -> None:
    """Where the pattern puts large layers into the place of small ones, more of them go."""
    sizes, kinds = [10, 1] * 4, ["large", "small"] * 4
    config = PlanConfig(method="influence", target_parameters=30)
    given: dict[str, Any] = {"influence": [9, 0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 9], "parameters": sizes}
    free = make_plan(near(8), config, **given)
    assert (len(free.kept), sum(sizes[layer] for layer in free.kept)) == (6, 24)
    bound = make_plan(near(8), config, pattern=(kinds, kinds), **given)
    assert [kinds[layer] for layer in bound.kept] == kinds[:4]
    assert sum(sizes[layer] for layer in bound.kept) == 22
    with pytest.raises(UserError, match="target_parameters 10 cannot be met"):
        make_plan(near(8), config.model_copy(update={"target_parameters": 10}), pattern=(kinds, kinds), **given)


@pytest.mark.parametrize(("first", "last", "least"), [(1, 1, 250), (0, 0, 150), (0, 1, 250), (1, 0, 150)])
def test_a_budget_of_parameters_below_the_least_is_told_with_numbers(first: int, last: int, least: int) -> None:
    with pytest.raises(UserError, match=rf"plan\.target_parameters 120 cannot be met.*{least}"):
        make_plan(
            near(6),
            partition(target_parameters=120, protect_first=first, protect_last=last),
            parameters=[100] * 6,
            other_parameters=50,
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", [PlanConfig(), partition(keep_layers=3)])
def test_a_matrix_that_is_not_finite_is_refused(value: float, config: PlanConfig) -> None:
    cka = near(5)
    cka[1, 3] = value
    with pytest.raises(UserError, match="not finite: collect again"):
        make_plan(cka, config)


def test_a_given_plan_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"num_layers": 5, "kept": [0, 4]}))
    plan = make_plan(near(5), PlanConfig(method="file", file=path))
    assert plan.kept == [0, 4]
    assert plan.dropped == [1, 2, 3]
    with pytest.raises(UserError, match=r"mine\.json is for 5 layers, the model has 6"):
        make_plan(near(6), PlanConfig(method="file", file=path))
    with pytest.raises(UserError, match=r"cannot read the plan .*other\.json"):
        make_plan(near(6), PlanConfig(method="file", file=tmp_path / "other.json"))


@pytest.mark.parametrize("method", [PlanConfig(measure="updates"), partition(keep_layers=3, measure="updates")])
def test_an_unknown_similarity_is_never_planned_with(method: PlanConfig) -> None:
    cka: list[list[Any]] = near(5).tolist()
    for layer in range(5):
        cka[2][layer] = cka[layer][2] = None
    with pytest.raises(UserError, match=r"the CKA of layer 2 is unknown: its updates do not vary.*plan\.measure"):
        make_plan(cka, method)
    broken = near(5)
    broken[1, 3] = np.inf
    with pytest.raises(UserError, match=r"not finite: collect again"):
        make_plan(broken, method)


def test_a_threshold_never_lets_more_go_than_the_budget_of_all_rounds() -> None:
    """Without it four layers go; of pairs of neighbours two suffice."""
    cka = [[1 - 0.001 * abs(one - other) for other in range(8)] for one in range(8)]
    config = PlanConfig(threshold=0.99, protect_first=1, protect_last=3)
    assert make_plan(cka, config).dropped == [1, 2, 3, 4]
    assert make_plan(cka, config, at_least=6).dropped == [1, 3]
    assert make_plan(cka, config, at_least=3).dropped == [1, 2, 3, 4]
