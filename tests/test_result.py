"""What rounds put into the run folder, and when they make it anew."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_model
from families import make_family

from mpruner_dist.config import PlanConfig, RoundsConfig
from mpruner_dist.errors import UserError
from mpruner_dist.plan import Plan, read_plan
from mpruner_dist.reporting.choice import choice
from mpruner_dist.rewriting.proof import compare_logits
from mpruner_dist.rewriting.rewrite import rewrite_checkpoint
from mpruner_dist.runs.commit import write_json
from mpruner_dist.runs.folder import RunFolder, open_run
from mpruner_dist.steps.result import result


def make_rounds(folder: Path, source: Path, kept: list[list[int]], depths: list[int] | None = None) -> None:
    """Accepted rounds, one after another; `depths` of a T5's stacks."""
    entries = []
    for number, layers in enumerate(kept, start=1):
        name, depth = f"round-{number:02d}", sum(depths or [8]) if number == 1 else len(kept[number - 2])
        rewrite_checkpoint(source, folder / name / "pruned", Plan.keeping(depth, layers))
        stacks = dict(zip(("encoder.block", "decoder.block"), depths or [], strict=False))
        layers_before = [f"model.layers.{layer}" for layer in range(depth)]
        write_json(folder / name / "cka.json", {"layers": layers_before, "stacks": stacks})
        write_json(folder / name / "plan.json", Plan.keeping(depth, layers).model_dump())
        entries.append({"round": number, "folder": name, "accepted": True, "seconds": 1.0, "why": "at most 10 %"})
        source = folder / name / "pruned"
    write_json(folder / "rounds.json", {"rounds": entries})


def walk(folder: RunFolder, again: bool = False) -> None:
    road: Any = SimpleNamespace(
        folder=folder, config=SimpleNamespace(retrain=None, plan=SimpleNamespace(method="anchor"))
    )
    inputs, outputs, make = result(road)
    folder.stage("result", inputs, outputs, make, remedy="", replace=again)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_model("llama", tmp_path / "model")
    return tmp_path / "model"


def test_the_result_tells_of_the_layers_of_the_original(tmp_path: Path, source: Path) -> None:
    with open_run(tmp_path / "run", "") as folder:
        make_rounds(folder.path, source, [[0, 1, 3, 4, 6, 7], [0, 2, 3, 5]])
        walk(folder)
    assert read_plan(tmp_path / "run/plan.json").kept == [0, 3, 4, 7]
    assert json.loads((tmp_path / "run/pruned/layer_map.json").read_text())["new_to_old"] == [0, 3, 4, 7]


def test_the_result_tells_of_the_stacks_of_the_original(tmp_path: Path) -> None:
    """In the form that one walk leaves, so that the result can be held against the original."""
    make_family("t5", tmp_path / "model")  # 5 blocks in the encoder, 4 in the decoder
    with open_run(tmp_path / "run", "") as folder:
        make_rounds(folder.path, tmp_path / "model", [[0, 1, 3, 4, 5, 6, 8], [0, 2, 3, 4, 6]], [5, 4])
        walk(folder)
    kept = [0, 3, 4, 5, 8]
    assert read_plan(tmp_path / "run/plan.json").kept == kept
    rewrite_checkpoint(tmp_path / "model", tmp_path / "at once", Plan.keeping(9, kept))
    maps = [json.loads((tmp_path / name / "layer_map.json").read_text()) for name in ("run/pruned", "at once")]
    assert maps[0]["stacks"]["decoder.block"] == {"old_to_new": {"0": 0, "3": 1}, "new_to_old": [0, 3]}
    assert maps[1].pop("request")  # of one rewrite, which the result of rounds is not
    assert maps[0] == maps[1]
    assert compare_logits(tmp_path / "run/pruned", tmp_path / "model") < 1e-5


def test_only_other_models_make_another_result(tmp_path: Path, source: Path) -> None:
    """How long a round took, and what was tolerated, may differ; the last model may not."""
    with open_run(tmp_path / "run", "") as folder:
        make_rounds(folder.path, source, [[0, 1, 3, 4, 6, 7]])
        walk(folder)
        record = json.loads((folder / "rounds.json").read_text())
        record["rounds"][0] |= {"seconds": 2.0, "why": "at most 20 %"}
        write_json(folder / "rounds.json", record)
        walk(folder)
        make_model("llama", source, seed=1)
        rewrite_checkpoint(source, folder / "other", [0, 1, 3, 4, 6, 7])
        (folder / "other/model.safetensors").replace(folder / "round-01/pruned/model.safetensors")
        with pytest.raises(UserError, match="pruned: was"):
            walk(folder)
        walk(folder, again=True)
        assert (folder / "pruned/model.safetensors").samefile(folder / "round-01/pruned/model.safetensors")


def test_where_no_round_is_accepted_any_more_no_earlier_model_stays(tmp_path: Path, source: Path) -> None:
    with open_run(tmp_path / "run", "") as folder:
        make_rounds(folder.path, source, [[0, 1, 3, 4, 6, 7]])
        walk(folder)
        assert (folder / "pruned").is_dir()
        record = json.loads((folder / "rounds.json").read_text())
        record["rounds"][0]["accepted"] = False
        write_json(folder / "rounds.json", record)
        walk(folder, again=True)
        assert not (folder / "pruned").exists()
        assert read_plan(folder / "plan.json").dropped == []
        assert (folder / "round-01/pruned").is_dir()


@pytest.mark.parametrize("keep_layers", [None, 4])
def test_the_report_claims_no_stride_for_all_rounds(keep_layers: int | None) -> None:
    """Nor that the budget of all rounds chose a threshold."""
    how = choice(PlanConfig(keep_layers=keep_layers), Plan.keeping(8, [0, 2, 7]), RoundsConfig(tolerance=0.1))[0]
    assert "is at least 0.98. Of each cluster its first layer stays" in how
    assert "at its stride" in how
    assert "stride 1" not in how
