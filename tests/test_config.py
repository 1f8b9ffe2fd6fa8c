"""The one YAML file: every mistake in one message, nothing corrected silently."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from configurations import data, full, load, minimal, refusal
from pydantic import ValidationError

from mpruner_dist.config_file import load_config
from mpruner_dist.errors import UserError


def test_every_mistake_comes_back_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    message = refusal(
        tmp_path,
        {
            "model": {"pathh": "x", "dtype": "float8"},
            "data": {"calibration": {"path": "a", "take": [0.5, 2]}, "block_size": 4, "tset": {"path": "b"}},
            "colect": {"samples": 9},
            "collect": {"samples": 3, "zzzz": 1},
            "plan": {"method": "partition", "keep_layers": 0},
            "retrain": {"learning_rate": "fast", "distillation": {"temprature": 2}},
            "cluster": {"zero_stage": 2},
        },
    )
    for part in [
        "model.path: must be given",
        "model.pathh: unknown key; did you mean 'path'?",
        "model.dtype: Input should be 'float32', 'bfloat16' or 'float16', got 'float8'",
        "data.calibration.take.1: Input should be less than or equal to 1, got 2",
        "data.block_size: Input should be greater than or equal to 8, got 4",
        "data.test: must be given",
        "data.tset: unknown key; did you mean 'test'?",
        "colect: unknown key; did you mean 'collect'?",
        "collect.samples: Input should be greater than or equal to 4, got 3",
        "collect.zzzz: unknown key; valid names: batch_size, ",
        "plan.keep_layers: Input should be greater than or equal to 1, got 0",
        "retrain.learning_rate: Input should be a valid number",
        "retrain.distillation.temprature: unknown key; did you mean 'temperature'?",
        "cluster.zero_stage: Input should be 'auto', 0 or 3, got 2",
    ]:
        assert f"  {part}" in message
    assert str(tmp_path / "config.yaml") in message
    assert f": {len(message.splitlines()) - 1} mistake(s)" in message
    assert len(message.splitlines()) == 15


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("data", {"calibration": {"path": "a", "take": [0.5, 0.5]}}, r"data.calibration: take [0.5, 0.5] is empty"),
        ("data", {"calibration": {"path": "b.jsonl"}}, "calibration takes [0.0, 1.0] and test takes [0.0, 1.0] of the"),
        ("plan", {"method": "partition"}, "plan: method partition needs keep_layers or target_parameters"),
        ("plan", {"method": "partition", "keep_layers": 2, "target_parameters": 2}, "just one of them"),
        ("plan", {"keep_layers": 2, "stride": 2}, "plan: stride 2 goes with threshold; with keep_layers it must be 1"),
        ("plan", {"method": "random"}, "plan: method random needs keep_layers or target_parameters, and just one"),
        ("plan", {"method": "file", "file": "f", "keep_layers": 2}, "plan: keep_layers is a budget, and method file"),
        ("plan", {"method": "last", "keep_layers": 2, "keep": "last"}, "plan: keep last goes with the methods anchor"),
        ("plan", {"keep": "medoid", "stride": 2}, "plan: stride 2 counts from an end of a cluster: keep must be first"),
        ("plan", {"method": "search", "keep_layers": 2, "preserve_pattern": True}, "after method search has judged"),
        ("plan", {"method": "greedy", "keep": "last"}, "just one of them; keep last goes with the methods"),
        ("plan", {"passes": 0}, "plan.passes"),
        ("plan", {"method": "file"}, "plan: method file and plan.file go together"),
        ("plan", {"file": "plan.json"}, "plan: method file and plan.file go together"),
        ("plan", {"threshold": 0}, "plan.threshold: Input should be greater than 0, got 0"),
        ("plan", {"threshold": float("nan")}, "plan.threshold: "),
        ("plan", {"stride": 4}, "plan.stride: "),
        ("retrain", {"steps": 5, "warmup_steps": 5}, "retrain: warmup_steps 5 must be less than steps 5"),
        ("retrain", {"learning_rate": 0}, "retrain.learning_rate: "),
        ("retrain", {}, "configuration: retrain needs data.train and data.validation"),
        ("retrain", {"trainable": "neighbors"}, "retrain.trainable: Input should be 'all' or 'neighbours'"),
        ("retrain", {"lora": {"targets": []}}, "retrain.lora.targets"),
        ("retrain", {"lora": {"dropout": 1}}, "retrain.lora.dropout: Input should be less than 1, got 1"),
        ("retrain", {"log_to": ["mlflow"]}, "retrain.log_to"),
        ("retrain", {"distillation": {"weight": 0.8, "hidden_weight": 0.3}}, "must be above 0 and at most 1"),
        ("retrain", {"distillation": {"weight": 0}}, "weight 0.0 + hidden_weight 0.0 must be above 0"),
        ("retrain", {"distillation": {"weight": 0, "hidden_weight": 0.1, "top_k": 2}}, "top_k compares predictions"),
        ("retrain", {"distillation": {"cache": True}}, "retrain.distillation: cache needs top_k"),
        ("retrain", {"distillation": {"cache": True, "top_k": 2, "hidden_weight": 0.1}}, "cache holds no hidden"),
        ("model", {"path": None}, "model.path: "),
        ("collect", {"outlier_norm": 1}, "collect.outlier_norm: "),
        ("collect", {"samples": 4.5}, "collect.samples: "),
        ("collect", {"estimator": "sentence", "unit": "sequence"}, "estimator sentence compares the tokens of a seq"),
        ("collect", {"unit": "sequence", "batch_size": 3}, "batch_size 3 gives 3 samples of unit sequence, 4 are n"),
        ("collect", {"until": "settled", "check_every": 3}, "collect.check_every: "),
        ("model", "some/model", "model: "),
        ("model", ["path"], "model: "),
    ],
)  # fmt: skip
def test_each_mistake_says_where_and_what(tmp_path: Path, section: str, change: Any, message: str) -> None:
    content = minimal()
    content[section] = content.get(section, {}) | change if isinstance(change, dict) else change
    assert message in refusal(tmp_path, content)


def test_a_task_of_the_harness_is_named_once(tmp_path: Path) -> None:
    tasks = [{"name": "arc_easy", "fewshot": shots} for shots in (0, 5)]
    message = "evaluate: tasks names arc_easy twice: results are told by name"
    assert message in refusal(tmp_path, minimal() | {"evaluate": {"tasks": tasks}})


@pytest.mark.parametrize(
    ("plan", "rounds", "goes"),
    [
        ({}, None, True),
        ({"keep_layers": 4}, None, False),
        ({"keep_layers": 4}, {"tolerance": 0.1}, True),
        ({"method": "influence", "keep_layers": 4}, {"tolerance": 0.1, "remove": 1}, False),
    ],
)
def test_what_decides_which_layers_go(tmp_path: Path, plan: Any, rounds: Any, goes: bool) -> None:
    content = {"model": {"path": "m"}, "data": data(), "plan": plan, "rounds": rounds}
    assert load(tmp_path, content).goes_by_threshold is goes


def test_parts_may_touch_but_not_overlap(tmp_path: Path) -> None:
    content = full()
    assert load(tmp_path, content).data.parts().keys() == {"calibration", "train", "validation", "test"}
    content["data"]["validation"]["take"] = [0.69, 0.8]
    message = refusal(tmp_path, content)
    assert "train takes [0.1, 0.7] and validation takes [0.69, 0.8] of the same 'corpus'" in message
    content["data"]["validation"]["path"] = "../" + Path.cwd().name + "/./corpus"
    assert "train takes [0.1, 0.7] and validation takes [0.69, 0.8] of the same" in refusal(tmp_path, content)
    content["data"]["validation"]["split"] = "another"
    assert load(tmp_path, content).data.validation


def test_a_part_that_is_inside_another_overlaps(tmp_path: Path) -> None:
    content = minimal()
    content["data"] = {"calibration": {"path": "a", "take": [0.4, 0.5]}, "test": {"path": "a"}}
    assert "give them ranges that do not overlap" in refusal(tmp_path, content)


@pytest.mark.parametrize(("workers", "micro", "good"), [(3, 2, True), (2, 3, True), (5, 2, False), (4, 2, False)])
def test_batches_must_divide_among_the_workers(tmp_path: Path, workers: int, micro: int, good: bool) -> None:
    content = full()
    content["cluster"]["workers"], content["retrain"]["micro_batch_size"] = workers, micro
    if good:
        assert load(tmp_path, content).retrain
    else:
        message = refusal(tmp_path, content)
        assert "retrain.batch_size 12 must be a multiple of" in message
        assert f"{workers} x retrain.micro_batch_size {micro} = {workers * micro}" in message


def test_what_is_infinite_is_refused(tmp_path: Path) -> None:
    for key in ("retrain.max_grad_norm", "collect.outlier_norm", "plan.threshold"):
        assert f"{key}: Input should be a finite number" in refusal(tmp_path, full(), f"{key}=.inf")


def test_tables_of_yaml_may_be_merged(tmp_path: Path) -> None:
    content = yaml.safe_dump({"model": {"path": "m"}})
    parts = """
data:
  calibration: &all {path: text.jsonl, take: [0.0, 0.1]}
  test: {<<: *all, take: [0.9, 1.0]}
"""
    config = load(tmp_path, content + parts)
    assert (config.data.test.path, config.data.test.take) == ("text.jsonl", (0.9, 1.0))
    twice = parts.replace("take: [0.9", "path: other, path: third, take: [0.9")
    assert "'path' is given twice" in refusal(tmp_path, content + twice)


def test_overrides_are_read_as_yaml_and_make_sections(tmp_path: Path) -> None:
    config = load(
        tmp_path, full(), "plan.stride=3", "data.test.take=[0.9, 1.0]", "retrain.learning_rate=1e-4",
        "collect.outlier_norm=3", "model.path=a=b", "evaluate.max_blocks=null", "retrain.distillation=",
    )  # fmt: skip
    assert config.plan.stride == 3
    assert config.data.test.take == (0.9, 1.0)
    assert config.model.path == "a=b"
    assert config.evaluate.max_blocks is None
    assert config.retrain is not None
    assert config.retrain.learning_rate == 1e-4
    assert config.retrain.distillation is None
    made = load(tmp_path, minimal() | {"collect": None}, "collect.seed=5", "evaluate.batch_size=2")
    assert (made.collect.seed, made.evaluate.batch_size) == (5, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.threshold", "write section.key=value"),
        ("=3", "write section.key=value"),
        ("plan..threshold=3", "write section.key=value"),
        ("model.path.deep=3", "path is a value, not a section"),
        ("plan.threshold=[", "the value is not YAML"),
        ("model.revision=2024-02-30", "the value is not YAML: day is out of range"),
        ("retrain={steps: 3, steps: 4}", "'steps' is given twice"),
        ("plan.treshold=0.9", "plan.treshold: unknown key; did you mean 'threshold'?"),
        ("plan.threshold=high", "plan.threshold: Input should be a valid number"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    assert message in refusal(tmp_path, minimal(), override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "is not YAML"),
        ("model: {path: m, revision: 2024-02-30}", "is not YAML: day is out of range"),
        ("", "must hold sections such as `model:` and `data:`, it holds NoneType"),
        ("- a\n- b\n", "it holds list"),
        ("just text", "it holds str"),
    ],
)
def test_a_file_that_holds_no_sections_is_refused(tmp_path: Path, content: str, message: str) -> None:
    said = refusal(tmp_path, content)
    assert message in said
    assert "config.yaml" in said


def test_a_missing_or_binary_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the configuration .*none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml", [])
    with pytest.raises(UserError, match=str(tmp_path)):
        load_config(tmp_path, [])  # a folder
    (tmp_path / "binary.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match=r"binary\.yaml"):
        load_config(tmp_path / "binary.yaml", [])


def test_a_key_that_is_no_text_is_refused(tmp_path: Path) -> None:
    assert "mistake" in refusal(tmp_path, minimal() | {1: 2})


def test_a_configuration_does_not_change(tmp_path: Path) -> None:
    config = load(tmp_path, full())
    with pytest.raises(ValidationError, match="frozen"):
        config.model = config.model  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.collect.samples = 5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.data.test.take = (0.0, 0.5)  # type: ignore[misc]
