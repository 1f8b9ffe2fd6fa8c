"""What the sections of a configuration ask of each other."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from configurations import full, load, minimal, refusal


def test_the_fewest_workers_are_not_more_than_all(tmp_path: Path) -> None:
    content = full()
    content["cluster"]["min_workers"] = 4
    assert "cluster: min_workers 4 must be at most workers 3" in refusal(tmp_path, content)


def test_settled_needs_a_threshold_to_compare_with(tmp_path: Path) -> None:
    content = minimal() | {"collect": {"until": "settled"}, "plan": {"method": "partition", "keep_layers": 3}}
    assert "which plan.method partition does not use: set plan.meth" in refusal(tmp_path, content)
    assert "which plan.method anchor with a budget does not" in refusal(tmp_path, content, "plan.method=anchor")
    assert load(tmp_path, content, "plan.method=anchor", "plan.keep_layers=null").collect.until == "settled"


@pytest.mark.parametrize("method", ["greedy", "search"])
def test_plans_are_judged_on_validation_text(tmp_path: Path, method: str) -> None:
    content = minimal() | {"plan": {"method": method, "keep_layers": 3}}
    assert f"plan.method {method} measures the loss of plans: it needs data.validation" in refusal(tmp_path, content)
    assert load(tmp_path, content, "data.validation.path=c.jsonl").plan.passes == 64


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (
            "text-classification",
            {"rounds.metric": "perplexity"},
            "rounds.metric perplexity is none of model.task text-cl",
        ),
        ("causal-lm", {"rounds.metric": "macro_f1"}, "macro_f1 is none of model.task causal-lm: perplexity, accuracy"),
        (
            "text-classification",
            {"rounds.metric": "task", "rounds.task": {"name": "arc_easy"}},
            "rounds.metric task is none of model.task text-classification: accuracy, macro_f1",
        ),
        (
            "text-classification",
            {"rounds.metric": "accuracy", "retrain.distillation": {"top_k": 3}},
            "top_k is of words, and model.task text-classification has classes",
        ),
        ("text-clasification", {}, "model.task"),
    ],
)
def test_a_task_has_its_own_metrics(tmp_path: Path, task: str, changes: dict[str, Any], message: str) -> None:
    parts = {part: {"path": f"{part}.csv"} for part in ("calibration", "train", "validation", "test")}
    content = {"model": {"path": "m", "task": task}, "data": parts, "retrain": {}, "rounds": {"tolerance": 0.1}}
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True).strip()}" for key, value in changes.items()]
    assert message in refusal(tmp_path, content, *(override.removesuffix("\n...") for override in overrides))


def test_a_classifier_is_judged_by_accuracy_or_macro_f1(tmp_path: Path) -> None:
    content = minimal() | {"model": {"path": "m", "task": "text-classification"}, "rounds": {"tolerance": 0.02}}
    content["data"] |= {"validation": {"path": "c.csv"}}
    for metric in ("accuracy", "macro_f1"):
        rounds = load(tmp_path, content, f"rounds.metric={metric}").rounds
        assert rounds is not None
        assert rounds.metric == metric
