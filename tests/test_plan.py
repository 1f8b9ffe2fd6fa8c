"""The plan as data: what it refuses, and layer ranges as people write them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpruner_dist.errors import UserError
from mpruner_dist.plan import Plan, format_layers, parse_layers, read_plan


def written(folder: Path, content: Any) -> Path:
    path = folder / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_plan_written_by_hand_needs_two_entries(tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path, {"num_layers": 6, "kept": [0, 1, 5]}), 6)
    assert plan.kept == [0, 1, 5]
    assert plan.dropped == [2, 3, 4]
    assert plan.method == "given"
    assert plan.clusters == []


@settings(max_examples=60)
@given(st.data(), st.integers(1, 40))
def test_a_plan_survives_being_written_and_read(tmp_path_factory: Any, data: st.DataObject, depth: int) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, depth - 1), min_size=1)))
    plan = Plan.keeping(depth, kept, clusters=[[0], [1, 2]], reasons={"1": {"like": 0, "cka": 0.5}}, method="anchor")
    assert sorted(plan.kept + plan.dropped) == list(range(depth))
    path = written(tmp_path_factory.getbasetemp(), plan.model_dump())
    assert read_plan(path, depth) == plan


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_layers": 4, "kept": []}, "kept is empty: a model needs at least one layer"),
        ({"num_layers": 4, "kept": [0, 4]}, "kept names layer 4; the model has layers 0 to 3"),
        ({"num_layers": 4, "kept": [-1, 0]}, "kept names layer -1"),
        ({"num_layers": 4, "kept": [0, 2, 2]}, "each layer once, in ascending order"),
        ({"num_layers": 4, "kept": [2, 0]}, "each layer once, in ascending order"),
        ({"num_layers": 4, "kept": [0, 1], "dropped": [2]}, r"dropped is \[2\], but what kept leaves out is \[2, 3\]"),
        ({"num_layers": 4, "kept": [0, 1], "dropped": [1, 2, 3]}, r"dropped is \[1, 2, 3\]"),
        ({"num_layers": 4}, "kept Field required"),
        ({"kept": [0]}, "num_layers Field required"),
        ({"num_layers": 4, "kept": [0], "keep": [1]}, "keep Extra inputs are not permitted"),
        ({"num_layers": 4, "kept": ["x"]}, r"kept\.0 .*valid integer"),
        ({"num_layers": 4, "kept": [0.5]}, r"kept\.0 .*valid integer"),
        ([1, 2], "valid dictionary"),
        ("{broken", "cannot read the plan"),
        ("", "cannot read the plan"),
    ],
)
def test_a_wrong_plan_is_refused_by_name_and_reason(tmp_path: Path, content: Any, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=message) as caught:
        read_plan(path, 4)
    assert str(path) in str(caught.value)


def test_a_plan_for_another_depth_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, {"num_layers": 4, "kept": [0]})
    with pytest.raises(UserError, match="is for 4 layers, the model has 5"):
        read_plan(path, 5)


def test_a_missing_or_binary_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the plan .*nothing\.json"):
        read_plan(tmp_path / "nothing.json", 4)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(UserError, match=r"cannot read the plan .*binary\.json"):
        read_plan(tmp_path / "binary.json", 4)


def test_keeping_refuses_what_a_file_may_not_say() -> None:
    assert Plan.keeping(3, [0, 2]).dropped == [1]
    with pytest.raises(UserError, match="the plan: kept is empty"):
        Plan.keeping(3, [])
    with pytest.raises(UserError, match="the plan: kept names layer 3"):
        Plan.keeping(3, [0, 3])


def test_a_plan_does_not_change() -> None:
    plan = Plan.keeping(3, [0, 2])
    with pytest.raises(ValueError, match="frozen"):
        plan.num_layers = 4  # type: ignore[misc]


@settings(max_examples=200)
@given(st.sets(st.integers(0, 200), min_size=1))
def test_ranges_survive_being_written_and_read(layers: set[int]) -> None:
    text = format_layers(sorted(layers))
    assert parse_layers(text) == sorted(layers)
    gaps = sum(layer - 1 not in layers for layer in layers)
    assert len(text.split(",")) == gaps  # nothing shorter says the same


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0-11,20-31", [*range(12), *range(20, 32)]),
        ("5", [5]),
        ("3-3", [3]),
        ("7,1-2", [1, 2, 7]),
        (" 0-1 , 4 ", [0, 1, 4]),
    ],
)
def test_ranges_are_inclusive_and_from_zero(text: str, layers: list[int]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", ",", "a", "1-", "-3", "1-2-3", "0-11;20", "1.5", "0,,1", "0x3", "²", "1-²"])
def test_what_is_no_range_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="write ranges such as 0-11,20-31"):
        parse_layers(text)


def test_backward_ranges_and_repeated_layers_are_refused() -> None:
    with pytest.raises(UserError, match="the range 5-3 runs backwards"):
        parse_layers("0-1,5-3")
    with pytest.raises(UserError, match="a layer is named twice"):
        parse_layers("0-5,5")


@settings(max_examples=200)
@given(st.text(st.sampled_from("0123456789-, x²٣"), max_size=7))
def test_any_text_is_layers_or_the_users_mistake(text: str) -> None:
    try:
        layers = parse_layers(text if len(text) < 6 else text[:5])
    except UserError:
        return
    assert layers == sorted(set(layers))
