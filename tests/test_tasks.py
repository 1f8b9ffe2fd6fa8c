"""Rounds that a task of the lm-evaluation-harness judges: its values, and a whole loop on a small model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_idle_layers, write_config
from ranks import on_ranks

from mpruner_dist.cluster.settings import inference_settings
from mpruner_dist.config import Config, ModelConfig, TaskConfig
from mpruner_dist.errors import UserError
from mpruner_dist.evaluation.extras import require_extras
from mpruner_dist.evaluation.tasks import read_value, run_task
from mpruner_dist.pipeline import run
from mpruner_dist.rewriting.proof import verify_checkpoint


def harness_results(**values: float) -> Any:
    results = {"alias": "quiz", **{f"{name},none": value for name, value in values.items()}, "acc_stderr,none": 0.1}
    return {"results": {"quiz": results}, "higher_is_better": {"quiz": {"acc": True, "bits": False}}}


def test_values_of_a_task() -> None:
    task = TaskConfig(name="quiz")
    assert read_value(harness_results(acc=0.5, bits=2.0), task) == {
        "task": 0.5, "task_metric": "acc", "task_less_is_better": False,
    }  # fmt: skip
    other = task.model_copy(update={"metric": "bits"})
    assert read_value(harness_results(acc=0.5, bits=2.0), other)["task_less_is_better"] is True
    with pytest.raises(UserError, match=r"no metric 'f1': set its metric to one of acc, bits"):
        read_value(harness_results(acc=0.5, bits=2.0), task.model_copy(update={"metric": "f1"}))


def test_a_tag_of_the_harness_is_no_task(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="glue is a tag that several tasks of the harness have"):
        run_task(None, tmp_path, TaskConfig(name="glue"), 1, trust_remote_code=False)


def test_a_metric_behind_several_filters_must_be_named_with_one() -> None:
    """As gsm8k reports it: the values differ, and neither is the metric's."""
    found = harness_results(bits=2.0)
    found["results"]["quiz"] |= {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5}
    strict = read_value(found, TaskConfig(name="quiz", metric="exact_match,strict-match"))
    assert (strict["task"], strict["task_metric"]) == (0.25, "exact_match,strict-match")
    assert read_value(found, TaskConfig(name="quiz", metric="exact_match,flexible-extract"))["task"] == 0.5
    assert read_value(found, TaskConfig(name="quiz", metric="bits,none"))["task_less_is_better"] is True
    names = 'set its metric to one of bits, "exact_match,strict-match", "exact_match,flexible-extract"$'
    with pytest.raises(UserError, match=f"the task quiz reports exact_match behind several filters: {names}"):
        read_value(found, TaskConfig(name="quiz", metric="exact_match"))
    with pytest.raises(UserError, match=f"has no metric 'exact_match,loose': {names}"):
        read_value(found, TaskConfig(name="quiz", metric="exact_match,loose"))
    with pytest.raises(UserError, match="reports no value of its own: name the tasks that it is made of"):
        read_value(harness_results(), TaskConfig(name="quiz"))
    found["results"]["quiz"].pop("bits,none")
    with pytest.raises(UserError, match="reports exact_match behind several filters"):
        read_value(found, TaskConfig(name="quiz"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"task": "sequence-to-sequence"}}, r"bleu, chrf, rouge_l, needs the extra generation: pip install"),
        (
            {"evaluate": {"tasks": [{"name": "quiz"}]}},
            r"evaluate\.tasks needs the extra eval: pip install",
        ),
        (
            {"rounds": {"tolerance": 0.1, "metric": "task", "task": {"name": "quiz"}, "remove": 1}},
            r"rounds\.metric task needs the extra eval",
        ),
    ],
)
def test_packages_that_are_missing_are_named_before_anything_begins(
    changes: dict[str, Any], message: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for section, change in changes.items():
        settings[section] = settings.get(section, {}) | change
    config = Config.model_validate(settings)
    require_extras(config)
    monkeypatch.setattr("mpruner_dist.evaluation.extras.find_spec", lambda _: None)
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def one_rank_ends_earlier(folder: Path) -> None:
    """On each of two ranks, the weights divided among them; to the second every word is the end of a text."""
    from mpruner_dist.models.engines import inference_engine

    zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    model = ModelConfig(path=str(folder / "model"))
    engine = inference_engine(inference_settings(zero, 3, "float32"), folder / "model", model, lambda _: None)
    rank = torch.distributed.get_rank()
    if rank == 1:
        engine.module.generation_config.eos_token_id = list(range(128))
    task = TaskConfig(name="say", metric="exact_match", folder=folder / "tasks")
    found = run_task(engine, folder / "model", task, 2, trust_remote_code=False)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    assert "generate" not in vars(engine.module)


def test_texts_that_end_earlier_on_one_worker_do_not_leave_the_others_waiting(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "model").symlink_to(tiny / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "model")
    rows = []
    for number in range(4):
        ids = tokenizer(f"w{number} w{number + 1}", return_tensors="pt").input_ids
        said = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        rows.append({"question": f"w{number} w{number + 1}", "answer": tokenizer.decode(said)})
    write_rows(tmp_path / "tasks", "say", rows, (
        "output_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
        "generation_kwargs: {until: [], max_gen_toks: 5, do_sample: false}\n"
        "metric_list:\n- {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    ))  # fmt: skip
    on_ranks(2, one_rank_ends_earlier, tmp_path)
    values = [json.loads((tmp_path / f"{rank}.json").read_text()).get("task") for rank in range(2)]
    assert values[0] == 1.0
    assert values[1] in (0.0, None)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_whole_loop(settings: dict[str, Any], mpruner: Any, tmp_path: Path) -> None:
    """Layers 3 to 5 are idle: the first round takes just them, the next finds nothing more; all in the original's
    numbers, judged by a task of our own with the harness."""
    make_idle_layers(tmp_path / "model", [3, 4, 5])
    write_task(tmp_path / "tasks")
    settings["model"]["path"] = str(tmp_path / "model")
    settings["collect"]["num_batches"] = 4
    settings["plan"] = {"method": "anchor", "threshold": 0.99}
    settings["retrain"] |= {"steps": 4, "eval_every": 2}  # DeepSpeed warms up from a rate of 0
    task = {"name": "quiz", "metric": "acc", "folder": str(tmp_path / "tasks")}
    settings["rounds"] = {"tolerance": 0.4, "metric": "task", "task": task}
    settings["evaluate"]["tasks"] = [task | {"limit": 4}]
    config = write_config(tmp_path / "config.yaml", settings)
    run = tmp_path / "run"
    code, output = mpruner("run", config, "--run-dir", run)
    assert code == 0, output
    record = json.loads((run / "rounds.json").read_text())
    assert [entry["removed"] for entry in record["rounds"]] == [[3, 4, 5]]
    assert record["task"] == "quiz acc"
    assert 0 <= record["rounds"][0]["metric"] <= 1
    assert record["stopped"].startswith("no layers are alike enough")
    assert json.loads((run / "plan.json").read_text())["dropped"] == [3, 4, 5]
    assert json.loads((run / "retrained/layer_map.json").read_text())["new_to_old"] == [0, 1, 2, 6, 7]
    assert (run / "retrained/model.safetensors").samefile(run / "round-01/retrained/model.safetensors")
    verify_checkpoint(run / "retrained")
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert list(evaluation) == ["original", "pruned", "retrained"]
    for entry in evaluation.values():
        assert entry["tasks"]["quiz"]["task"] in (0, 0.25, 0.5, 0.75, 1)  # of four questions
        assert entry["task"] * 6 == pytest.approx(round(entry["task"] * 6))  # of all six
    assert "quiz (acc)" in output
    assert "quiz (acc)" in (run / "report.html").read_text()
    baseline = json.loads((run / "baseline.json").read_text())
    assert "tasks" not in baseline["original"]
    assert "a loss of at most 0.4 is tolerated" in (run / "report.html").read_text()
    assert "## Rounds" in (run / "retrained/README.md").read_text()
    code, output = mpruner("run", config, "--run-dir", run)
    assert code == 0, output
    assert "starting Ray" not in output
    code, output = mpruner("plan", config, "--run-dir", run)
    assert code == 2
    assert "--set rounds=null" in output


def write_task(folder: Path) -> None:
    """A multiple-choice task of the harness over words of the tokenizer."""
    rows = [{"question": f"w{n} w{n + 1}", "choices": [f"w{n + 2}", f"w{n + 3}"], "answer": n % 2} for n in range(6)]
    write_rows(folder, "quiz", rows, (
        "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n"
    ))  # fmt: skip


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]], settings: str) -> None:
    folder.mkdir()
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(folder / f'{name}.jsonl'))}}}}}\n"
        f"test_split: test\n{settings}"
    )
