"""All planners at equal depth."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_plans import random_cka, some_losses

from mpruner_dist.config import PlanConfig
from mpruner_dist.errors import UserError
from mpruner_dist.planning.comparison import COMPARED, compare_planners
from mpruner_dist.reporting.comparison import comparison_table, print_comparison
from mpruner_dist.steps.compare import compare, default_depths, split

LAYERS = 9


def given(**changes: Any) -> dict[str, Any]:
    return {
        "cka": random_cka(0, LAYERS), "config": PlanConfig(passes=30, **changes), "stderr": None,
        "influence": np.random.default_rng(0).uniform(size=LAYERS), "angular": 1 - random_cka(1, LAYERS + 1),
        "parameters": [1] * LAYERS, "other_parameters": 0,
    }  # fmt: skip


def test_every_planner_is_compared_at_every_depth_on_other_text() -> None:
    content = compare_planners(lambda: some_losses(LAYERS), lambda: some_losses(LAYERS, seed=1), given(), [1, 3])
    json.dumps(content, allow_nan=False)
    assert list(content["planners"]) == list(COMPARED)
    held_out = some_losses(LAYERS, seed=1)
    for by_depth in content["planners"].values():
        for depth in (1, 3):
            entry = by_depth[str(depth)]
            assert len(entry["dropped"]) == depth
            assert entry["loss"] == pytest.approx(held_out.loss(entry["dropped"]))
    passes = {name: by_depth["3"]["passes"] for name, by_depth in content["planners"].items()}
    assert passes["greedy"] == pytest.approx(1 + 7 + 6 + 5)  # alone, though depth 1 had measured some of it
    assert 0 < passes["search"] <= 30
    assert {name for name, spent in passes.items() if spent} == {"greedy", "search"}
    judged = some_losses(LAYERS)
    losses = {name: judged.loss(by_depth["3"]["dropped"]) for name, by_depth in content["planners"].items()}
    assert losses["search"] == min(losses.values())


def test_a_planner_that_refuses_does_not_stop_the_others() -> None:
    known = given()
    known["cka"][4, 4] = np.nan
    known["influence"][2] = np.nan
    content = compare_planners(lambda: some_losses(LAYERS), lambda: some_losses(LAYERS), known, [2])
    refused = {name for name, by_depth in content["planners"].items() if by_depth["2"]["dropped"] is None}
    assert refused == set(COMPARED) - {"angular", "last", "random", "greedy", "search"}
    assert "CKA of layer 4 is unknown" in content["planners"]["partition"]["2"]["refused"]


def test_the_table_marks_the_lowest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = compare_planners(lambda: some_losses(LAYERS), lambda: some_losses(LAYERS), given(), [1, 2])
    headings, rows = comparison_table(content)
    assert headings == ("planner", "1", "2", "passes")
    cells = {row[0]: row[1:] for row in rows}
    assert cells["greedy"][0].endswith(" *")  # of one layer, on the text that it judged by
    assert cells["greedy"][2] == "14.0"
    (tmp_path / "compare.json").write_text(json.dumps(content))
    print_comparison(tmp_path / "compare.json")
    assert "search" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("layers", "depths"), [(2, [1]), (8, [1, 2]), (30, [2, 4, 6, 8, 10]), (80, [6, 12, 18, 24]), (126, [9, 18, 27, 36])]
)
def test_depths_go_up_to_a_third(layers: int, depths: list[int]) -> None:
    assert default_depths(layers, layers) == depths
    assert default_depths(layers, 1) == [1]


def road(folder: Path, blocks: int, validation: bool = True, **plan: Any) -> Any:
    names = {"layers": [f"model.layers.{layer}" for layer in range(8)], "cka": [], "stderr": None}
    (folder / "cka.json").write_text(json.dumps(names | {"block_influence": [], "angular_distance": []}))
    config = SimpleNamespace(data=SimpleNamespace(validation=validation or None), plan=PlanConfig(**plan))
    return SimpleNamespace(config=config, folder=folder, num_blocks=lambda _: blocks)


def test_nothing_is_judged_and_held_out(tmp_path: Path) -> None:
    assert split(road(tmp_path, 9)) == (5, 9)
    for number, (blocks, plan, message) in enumerate([
        (1, {}, "judges on 1 blocks of the validation part and compares on the rest, and the run has 1"),
        (9, {"judge_blocks": 9}, r"judges on 9 blocks .* lower plan\.judge_blocks"),
    ]):  # fmt: skip
        (tmp_path / str(number)).mkdir()
        with pytest.raises(UserError, match=message):
            split(road(tmp_path / str(number), blocks, **plan))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"it needs data\.validation"):
        split(road(tmp_path / "none", 9, validation=False))


@pytest.mark.parametrize("depths", [[0, 1], [2, 7]])
def test_depths_that_cannot_be(tmp_path: Path, depths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpruner_dist.steps.compare.measured", lambda *_: {"cka": [[]] * 8, "stacks": [8]})
    with pytest.raises(UserError, match=rf"--depths {depths[0]},{depths[1]}: from 1 to 6 of 8 layers can go"):
        compare(road(tmp_path, 9), depths)
    with pytest.raises(UserError, match="from 1 to 7 of 8 layers can go"):  # one always stays
        compare(road(tmp_path, 9, protect_first=0, protect_last=0), [8])
