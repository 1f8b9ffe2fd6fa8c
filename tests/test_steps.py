"""What stages are made from."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model
from safetensors.torch import load_file

from mpruner_dist import pipeline
from mpruner_dist.config import Config
from mpruner_dist.data.blocks import Blocks
from mpruner_dist.errors import Preempted, UserError
from mpruner_dist.evaluation import job
from mpruner_dist.models.scoring import Score
from mpruner_dist.plan import Plan
from mpruner_dist.rewriting.rewrite import run_here
from mpruner_dist.road import Road
from mpruner_dist.runs.commit import write_json
from mpruner_dist.runs.folder import RunFolder, open_run
from mpruner_dist.steps.evaluate import baseline
from mpruner_dist.steps.plan import judge, plan
from mpruner_dist.steps.report import report
from mpruner_dist.steps.retrain import _result_of
from mpruner_dist.steps.rewrite import rewrite


def config_for(tasks: Path) -> Config:
    parts = ("calibration", "train", "validation", "test")
    return Config.model_validate({
        "model": {"path": "original"}, "data": {part: {"path": f"{part}.txt"} for part in parts},
        "rounds": {"tolerance": 0.1, "metric": "task", "task": {"name": "quiz", "folder": str(tasks)}},
    })  # fmt: skip


def test_a_task_whose_files_change_is_another_task(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    (tmp_path / "tasks/__pycache__").mkdir(parents=True)
    (tmp_path / "tasks/quiz.yaml").write_text("task: quiz")
    road: Any = SimpleNamespace(
        config=config_for(tmp_path / "tasks"), source=tmp_path / "model", text=str, rounding=dict
    )
    before = baseline(road)[0]
    (tmp_path / "tasks/__pycache__/utils.pyc").write_bytes(b"compiled")
    assert baseline(road)[0] == before
    (tmp_path / "tasks/quiz.yaml").write_text("task: quiz\nnum_fewshot: 3")
    assert baseline(road)[0] != before


def test_rounds_from_the_same_model_share_the_losses_of_plans(tmp_path: Path) -> None:
    """After a roll back, what was measured is not measured again; by the model's digest it is never another's."""
    run = SimpleNamespace(work=lambda kind, inputs: tmp_path / kind / inputs["model"])
    config = SimpleNamespace(model=SimpleNamespace(dtype="float32"), evaluate=SimpleNamespace(batch_size=4))
    seen: list[Path] = []

    def on_workers(*_: Any, work: Path, **__: Any) -> None:
        seen.append(work)
        write_json(work / "result.json", {})

    for number in (1, 2):
        road: Any = SimpleNamespace(
            run=run, config=config, model_id="the same", text=str, source=tmp_path, blocks=Path, on_workers=on_workers,
            rounding=dict,
            work=lambda kind, inputs, number=number: tmp_path / f"round-{number:02d}",
        )  # fmt: skip
        judge(road, {}, None, 1.0)
    assert seen == [tmp_path / "plan/the same"] * 2


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "deepspeed").glob("*.json")), ids=lambda path: path.name)
def test_retraining_goes_on_under_every_deepspeed_configuration_of_ours(path: Path) -> None:
    assert _result_of(json.loads(path.read_text())) == _result_of({}) == {}


def test_what_a_deepspeed_configuration_says_of_the_result() -> None:
    optimizer = {"type": "AdamW", "params": {"lr": "auto"}}
    given = {"optimizer": optimizer, "fp16": {"enabled": True, "loss_scale": 8}, "train_batch_size": 4}
    assert _result_of(given) == {"optimizer": optimizer, "fp16": {"loss_scale": 8}}


def test_weights_that_are_quantized_are_other_weights(tmp_path: Path) -> None:
    """What says only where tensors lie is not among the inputs of a stage that runs forward."""
    make_model("llama", tmp_path / "model")
    settings = config_for(tmp_path).model_dump(mode="json")
    settings["model"]["path"] = str(tmp_path / "model")
    settings["cluster"]["deepspeed"] = str(tmp_path / "zero.json")
    zero: dict[str, Any] = {"stage": 3, "offload_param": {"device": "cpu"}}
    seen = []
    for more in ({}, {"zero_quantized_weights": True}):
        write_json(tmp_path / "zero.json", {"zero_optimization": zero | more})
        seen.append(Road(Config.model_validate(settings), RunFolder(tmp_path / "run", "")).rounding())
    assert seen == [{}, {"deepspeed": {"zero_quantized_weights": True}}]


class Opened:
    """A road without a model."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self.config, self.folder = config, folder

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_a_comparison_made_after_the_report_goes_into_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(tmp_path / "run", "") as folder:
        for name in ("data/data.json", "cka.json", "plan.json", "evaluation.json"):
            write_json(folder / name, {})
        road: Any = SimpleNamespace(folder=folder, config=config_for(tmp_path))
        folder.stage("report", report(road)[0], (), lambda: None, remedy="")

    monkeypatch.setattr(pipeline, "Road", Opened)
    monkeypatch.setattr(pipeline, "run", lambda config, run_dir, last: run_dir)
    monkeypatch.setattr(pipeline, "compare", lambda road, depths: write_json(road.folder / "compare.json", {"cka": ""}))
    pipeline.compare_plans(config_for(tmp_path), tmp_path / "run", None)
    assert "report" not in json.loads((tmp_path / "run/manifest.json").read_text())["stages"]


def test_the_report_follows_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a plan by another threshold is the same plan: nothing is refused that only tells."""
    written: list[str] = []
    monkeypatch.setattr(pipeline, "STEPS", {"report": lambda road: (report(road)[0], (), lambda: written.append(""))})
    config = config_for(tmp_path).model_copy(update={"rounds": None})
    with open_run(tmp_path / "run", "") as folder:
        for name in ("data/data.json", "cka.json", "plan.json", "evaluation.json"):
            write_json(folder / name, {})
        for threshold, times in ((0.98, 1), (0.98, 1), (0.97, 2)):
            changed = config.model_copy(update={"plan": config.plan.model_copy(update={"threshold": threshold})})
            road: Any = Opened(changed, folder)
            pipeline._walk(road, "report", again=False, collected=None)
            assert len(written) == times


def test_a_signal_during_a_task_is_heard_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness looks for none: the model's results are saved, then all stop before the next model."""
    signals: list[str] = []

    def stop(saved: str) -> None:
        raise Preempted(saved)

    def run_task(*_: Any) -> dict[str, Any]:
        signals.append("SIGTERM")
        return {"task": 0.5}

    score = Score(1.0, {"accuracy": 0.5}, 1, 1.0)
    blocks = Blocks(np.zeros((1, 8), np.int32), np.array([8]))
    engine = SimpleNamespace(module=SimpleNamespace(config=None), destroy=lambda: None)
    for name, value in {
        "start_deepspeed": None, "forward_settings": {}, "logits_bytes": 0, "read_config": None, "load_part": blocks,
        "inference_engine": engine,
        "num_batches": 1, "score_part": score, "run_blocks": range(8),
        "read_checkpoint": SimpleNamespace(num_parameters=1, num_bytes=4),
    }.items():  # fmt: skip
        monkeypatch.setattr(job, name, lambda *_, value=value: value)
    monkeypatch.setattr(job, "run_task", run_task)
    nothing = dict.fromkeys(("barrier", "begin_progress", "log", "tell"), lambda *_: None)
    nothing["select_on_first"] = lambda items, is_wanted: list(filter(is_wanted, items))
    nothing |= {"is_first": True, "world_size": 1, "device": torch.device("cpu")}
    worker: Any = SimpleNamespace(must_stop=lambda: bool(signals), stop=stop, **nothing)
    models = {"original": tmp_path, "pruned": tmp_path}
    spec = {"config": config_for(tmp_path), "models": models, "results": tmp_path, "original": tmp_path}
    with pytest.raises(Preempted):
        job.evaluate_job(worker, spec | {"blocks": tmp_path, "deepspeed": {}, "tasks": ()})
    assert (tmp_path / "original.json").exists()
    assert signals == ["SIGTERM"]


def test_the_peak_of_memory_is_that_of_the_worker_with_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5_000)
    others = {"least_over_workers": lambda mine: [min(mine, -7_000)]}  # another worker's is 7,000
    worker: Any = SimpleNamespace(device=torch.device("cuda", 1), **others)
    assert job.gpu_memory(worker) == {"gpu_bytes": 7_000}
    worker.device = torch.device("cpu")
    assert job.gpu_memory(worker) == {}


def test_other_text_for_rounds_is_refused_with_a_command_that_rounds_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "Road", Opened)
    made: list[str] = []
    monkeypatch.setitem(pipeline.STEPS, "data", lambda road: ({"text": "new"}, (), lambda: made.append("data")))
    monkeypatch.setattr(pipeline, "prune_in_rounds", lambda road, again: made.append("rounds"))
    monkeypatch.setitem(pipeline.STEPS, "evaluate", lambda road: ({}, (), lambda: made.append("evaluate")))
    config = config_for(tmp_path)
    with open_run(tmp_path / "run", "") as folder:
        folder.stage("data", {"text": "old"}, (), lambda: None, remedy="")
    with pytest.raises(UserError, match="mpruner evaluate CONFIG"):
        pipeline.run(config, tmp_path / "run")
    pipeline.run(config, tmp_path / "run", last="evaluate", again=True)
    assert made == ["data", "rounds", "evaluate"]


def test_only_a_plan_by_hand_may_keep_all_layers(tmp_path: Path) -> None:
    """So that the original can be retrained alone, for comparison."""
    make_model("llama", tmp_path / "model", num_hidden_layers=3)
    data = {part: {"path": f"{part}.txt"} for part in ("calibration", "test")}

    def made_by(plan: dict[str, Any]) -> Any:
        config = Config.model_validate({"model": {"path": "m"}, "data": data, "plan": plan})
        session = SimpleNamespace(run_tasks=lambda function, items, progress: run_here(function, items))
        return SimpleNamespace(
            config=config, source=tmp_path / "model", model_id="m", folder=tmp_path, session=session,
            plan=lambda: Plan.keeping(3, [0, 1, 2]), stacks=lambda: [3],
        )  # fmt: skip

    with pytest.raises(UserError, match="the plan removes nothing"):
        rewrite(made_by({"threshold": 0.99}))[2]()
    with pytest.raises(UserError, match=r"all of them always stay.*lower plan\.protect_first or plan\.protect_last"):
        rewrite(made_by({"threshold": 0.99, "protect_first": 2}))[2]()
    rewrite(made_by({"method": "file", "file": "all.json"}))[2]()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "pruned"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_runs_own_plan_may_be_edited_and_given_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "config: here\n")
    (tmp_path / "cka.json").write_text(json.dumps({
        "layers": [], "cka": np.eye(4).tolist(), "stderr": None, "block_influence": None, "angular_distance": None,
    }))  # fmt: skip
    (tmp_path / "plan.json").write_text('{"num_layers": 4, "kept": [0, 2, 3]}')
    data = {part: {"path": f"{part}.txt"} for part in ("calibration", "test")}
    by_hand = {"method": "file", "file": str(tmp_path / "plan.json")}
    config = Config.model_validate({"model": {"path": "m"}, "data": data, "plan": by_hand})
    road: Any = SimpleNamespace(
        config=config,
        folder=folder,
        checkpoint=SimpleNamespace(tensors={}, num_parameters=0),
        stacks=lambda: [4],
        run=None,
    )
    for attempt in range(2):  # it is written anew, in the form of all plans
        inputs, outputs, make = plan(road)
        folder.stage("plan", inputs, outputs, make, remedy="mpruner plan CONFIG")
        assert json.loads((tmp_path / "plan.json").read_text())["kept"] == [0, 2, 3], attempt
    (tmp_path / "plan.json").write_text('{"num_layers": 4, "kept": [0, 3]}')
    assert folder.changes("plan", plan(road)[0]) == ["file: was [0, 2, 3], is [0, 3]"]
