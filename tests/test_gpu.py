"""What only a GPU shows: whole commands with one worker on it, beside the same on CPUs."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import Mpruner, make_model, make_text, make_tokenizer, settings_for, write_config
from test_images import CLASSES, settings_of_images, some_images, write_idx

from mpruner_dist.data.parts import load_part
from mpruner_dist.rewriting.proof import verify_checkpoint

pytestmark = [
    pytest.mark.ray,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
Run = Callable[..., tuple[int, str]]


def on_gpu(settings: dict[str, Any]) -> dict[str, Any]:
    settings["cluster"]["device"] = "cuda"
    return settings


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())


def largest_difference(one: Any, other: Any) -> float:
    return float(np.abs(np.array(one) - np.array(other)).max())


def test_a_gpu_finds_and_trains_what_a_cpu_does(
    tiny: Path, settings: dict[str, Any], mpruner: Run, finished: Path, tmp_path: Path
) -> None:
    config, run = write_config(tmp_path / "config.yaml", on_gpu(settings)), tmp_path / "run"
    code, output = mpruner("run", config, "--run-dir", run)
    assert code == 0, output
    for stage in ("collect", "retrain", "evaluate"):
        assert "on cuda:0" in (run / f"logs/{stage}-rank0.log").read_text()
    here, there = read(run, "cka.json"), read(finished, "cka.json")
    assert largest_difference(here["cka"], there["cka"]) < 1e-5
    assert largest_difference(here["updates"]["cka"], there["updates"]["cka"]) < 1e-5
    assert largest_difference(here["angular_distance"], there["angular_distance"]) < 1e-4
    assert largest_difference(here["block_influence"], there["block_influence"]) < 1e-4
    assert here["null"]["quantile"] == pytest.approx(there["null"]["quantile"], rel=1e-3)
    assert read(run, "plan.json")["kept"] == read(finished, "plan.json")["kept"]
    losses, expected = read(run, "retrain.json"), read(finished, "retrain.json")
    assert np.array(losses["loss"]) == pytest.approx(np.array(expected["loss"]), rel=1e-3)
    assert np.array(losses["validation_loss"]) == pytest.approx(np.array(expected["validation_loss"]), rel=1e-3)
    evaluation, of_cpu = read(run, "evaluation.json"), read(finished, "evaluation.json")
    for label, entry in evaluation.items():
        assert entry["loss"] == pytest.approx(of_cpu[label]["loss"], rel=1e-3)
        assert entry["gpu_bytes"] > entry["bytes"]
    verify_checkpoint(run / "retrained")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_with_a_judge_and_a_teacher(
    settings: dict[str, Any], mpruner: Run, finished: Path, tmp_path: Path, dtype: str
) -> None:
    settings["model"]["dtype"] = dtype
    settings["plan"] = {"method": "greedy", "keep_layers": 6}
    settings["retrain"] |= {"steps": 20, "activation_checkpointing": True}
    settings["retrain"]["distillation"] |= {"hidden_weight": 0.2}
    config, run = write_config(tmp_path / "config.yaml", on_gpu(settings)), tmp_path / "run"
    code, output = mpruner("run", config, "--run-dir", run)
    assert code == 0, output
    assert largest_difference(read(run, "cka.json")["cka"], read(finished, "cka.json")["cka"]) < 0.02
    evaluation = read(run, "evaluation.json")
    assert evaluation["original"]["loss"] == pytest.approx(read(finished, "evaluation.json")["original"]["loss"], 0.01)
    assert evaluation["retrained"]["loss"] < evaluation["pruned"]["loss"]
    verify_checkpoint(run / "retrained")


def test_partitions_in_cpu_memory(settings: dict[str, Any], mpruner: Run, finished: Path, tmp_path: Path) -> None:
    """ZeRO stage 3 with the weights beside the GPU, and in training Adam's moments too."""
    offload: dict[str, Any] = {"device": "cpu", "pin_memory": True}
    # as small as they are, they would stay on the GPU
    zero = {"stage": 3, "offload_param": offload, "stage3_param_persistence_threshold": 0}
    (tmp_path / "inference.json").write_text(json.dumps({"zero_optimization": zero}))
    (tmp_path / "training.json").write_text(json.dumps({"zero_optimization": zero | {"offload_optimizer": offload}}))
    settings["cluster"]["deepspeed"] = str(tmp_path / "inference.json")
    settings["retrain"] |= {"zero_stage": 3, "deepspeed": str(tmp_path / "training.json")}
    config, run = write_config(tmp_path / "config.yaml", on_gpu(settings)), tmp_path / "run"
    code, output = mpruner("run", config, "--run-dir", run)
    assert code == 0, output
    assert largest_difference(read(run, "cka.json")["cka"], read(finished, "cka.json")["cka"]) < 1e-5
    losses, expected = read(run, "retrain.json"), read(finished, "retrain.json")
    assert np.array(losses["loss"]) == pytest.approx(np.array(expected["loss"]), rel=1e-3)
    evaluation, of_cpu = read(run, "evaluation.json"), read(finished, "evaluation.json")
    assert evaluation["retrained"]["loss"] == pytest.approx(of_cpu["retrained"]["loss"], rel=1e-3)


def steps_done(run: Path) -> int:
    """About so many, as the log of a training that runs says."""
    return sum(len(log.read_text().splitlines()) for log in run.glob("retrain/*/metrics.jsonl"))


def test_stopped_in_training_it_goes_on_as_if_it_had_not_been(
    settings: dict[str, Any], mpruner: Run, start: Mpruner, tmp_path: Path
) -> None:
    settings["retrain"] |= {"steps": 400, "save_every": 10, "eval_every": 200, "zero_stage": 2}
    config, run, other = write_config(tmp_path / "config.yaml", on_gpu(settings)), tmp_path / "run", tmp_path / "other"
    code, output = mpruner("run", config, "--run-dir", run, "--until", "rewrite")
    assert code == 0, output
    shutil.copytree(run, other)
    code, output = mpruner("run", config, "--run-dir", other)
    assert code == 0, output
    process = start("run", config, "--run-dir", run)
    deadline = time.monotonic() + 120
    while steps_done(run) < 20:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert steps_done(run) < 400
    code, output = mpruner("run", config, "--run-dir", run)
    assert code == 0, output
    losses, expected = read(run, "retrain.json")["loss"], read(other, "retrain.json")["loss"]
    assert [step for step, _ in losses] == [step for step, _ in expected]
    assert np.array(losses) == pytest.approx(np.array(expected), rel=1e-3)


@pytest.fixture
def large_vocabulary(tmp_path: Path) -> dict[str, Any]:
    """Settings of a model whose logits of enough tokens fill a GPU, and how many sequences of 512 that takes."""
    make_model("llama", tmp_path / "model", vocab_size=200_000, max_position_embeddings=512)
    make_tokenizer(tmp_path / "model")
    make_text(tmp_path / "text.jsonl", records=20_000)
    settings = settings_for(tmp_path)
    settings["data"]["block_size"] = 512
    return on_gpu(settings)


def sequences_that_fill() -> int:
    """Their float32 logits take all memory of the GPU."""
    return torch.cuda.get_device_properties(0).total_memory // (200_000 * 4 * 512) + 1


def test_too_large_a_batch_in_training_is_told(large_vocabulary: dict[str, Any], mpruner: Run, tmp_path: Path) -> None:
    size = sequences_that_fill()
    large_vocabulary["retrain"] |= {"batch_size": size, "micro_batch_size": size}
    large_vocabulary["evaluate"] = {"batch_size": 2, "max_blocks": 4}
    config = write_config(tmp_path / "config.yaml", large_vocabulary)
    code, output = mpruner("run", config, "--run-dir", tmp_path / "run", env=os.environ | {"COLUMNS": "500"})
    assert code == 1, output
    assert "out of memory" in output
    assert "Lower retrain.micro_batch_size" in output
    assert "Traceback" not in output


def test_too_large_a_batch_in_evaluation_is_told(
    large_vocabulary: dict[str, Any], mpruner: Run, tmp_path: Path
) -> None:
    large_vocabulary["evaluate"] = {"batch_size": sequences_that_fill()}
    large_vocabulary["retrain"] = None
    config = write_config(tmp_path / "config.yaml", large_vocabulary)
    code, output = mpruner("run", config, "--run-dir", tmp_path / "run", env=os.environ | {"COLUMNS": "500"})
    assert code == 1, output
    assert "a smaller evaluate.batch_size" in output


def test_images_in_bfloat16(mpruner: Run, tmp_path: Path) -> None:
    for prefix, count in (("train", 200), ("t10k", 60)):
        pixels, labels = some_images(count, seed=count)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", pixels)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", labels)
    torch.manual_seed(0)
    transformers.ResNetForImageClassification(transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[3, 3], layer_type="basic",
        id2label=dict(enumerate(CLASSES)), label2id={name: n for n, name in enumerate(CLASSES)},
    )).save_pretrained(tmp_path / "model")  # fmt: skip
    asked = on_gpu(settings_of_images(tmp_path, tmp_path))
    asked["model"]["dtype"] = "bfloat16"
    asked["plan"] = {"keep_layers": 4, "protect_last": 0}
    asked["retrain"] |= {"steps": 30, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 3e-3}
    run = tmp_path / "run"
    code, output = mpruner("run", write_config(tmp_path / "config.yaml", asked), "--run-dir", run)
    assert code == 0, output
    evaluation = read(run, "evaluation.json")
    assert evaluation["retrained"]["loss"] < evaluation["pruned"]["loss"]
    part = load_part(run / "data/test.safetensors")
    pixels = (torch.from_numpy(part.pixels).float() / 255 - 0.5) / 0.5
    model = transformers.AutoModelForImageClassification.from_pretrained(run / "retrained", dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(pixel_values=pixels).logits
    loss = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(part.labels).long()))
    assert evaluation["retrained"]["loss"] == pytest.approx(loss, rel=0.05)


def test_speech_that_is_generated(mpruner: Run, tmp_path: Path) -> None:
    speech_models = pytest.importorskip("speech_models")
    speech_models.make_recordings(tmp_path)
    asked = on_gpu(speech_models.settings(tmp_path))
    run = tmp_path / "run"
    code, output = mpruner("run", write_config(tmp_path / "config.yaml", asked), "--run-dir", run)
    assert code == 0, output
    evaluation = read(run, "evaluation.json")
    assert read(run, "plan.json")["dropped"] == speech_models.IDLE
    assert evaluation["original"]["word_error_rate"] <= 1 / speech_models.SAID + 1e-6


def test_a_task_of_the_harness_judges(settings: dict[str, Any], mpruner: Run, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from test_tasks import write_task

    write_task(tmp_path / "tasks")
    settings["retrain"] = None
    task = {"name": "quiz", "metric": "acc", "folder": str(tmp_path / "tasks")}
    settings["rounds"] = {"tolerance": 1.0, "metric": "task", "task": task, "max_rounds": 1}
    config, run = write_config(tmp_path / "config.yaml", on_gpu(settings)), tmp_path / "run"
    code, output = mpruner("run", config, "--run-dir", run)
    assert code == 0, output
    [first] = read(run, "rounds.json")["rounds"]
    assert 0 <= first["metric"] <= 1
    assert read(run, "evaluation.json")["pruned"]["layers"] == len(first["kept"]) < 8


def test_the_doctor_finds_the_gpu(mpruner: Run, tmp_path: Path) -> None:
    code, output = mpruner("doctor", "--device", "cuda", "--workers", "1", "--run-dir", tmp_path / "run")
    assert code == 0, output
    code, facts = mpruner("env")
    assert code == 0, facts
    assert torch.cuda.get_device_name(0) in facts
