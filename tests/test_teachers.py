"""Which teachers are refused before anything is loaded, and where a training run is recorded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import WORDS, make_model, make_tokenizer

from mpruner_dist.config import DistillationConfig
from mpruner_dist.errors import UserError
from mpruner_dist.retraining import metrics
from mpruner_dist.retraining.matching import require_fitting_teacher
from mpruner_dist.retraining.metrics import Metrics, require_loggers
from mpruner_dist.retraining.teacher import teacher_settings
from mpruner_dist.runs.digest import digest


def model_like(tiny: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(tiny / "model", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def refusal(teacher: Path, tiny: Path, **config: Any) -> str:
    with pytest.raises(UserError) as caught:
        require_fitting_teacher(teacher, tiny / "model", DistillationConfig.model_validate(config))
    return str(caught.value)


def test_a_teacher_of_the_same_words_may_be_larger(tiny: Path, tmp_path: Path) -> None:
    teacher = model_like(tiny, tmp_path / "t", hidden_size=64, num_hidden_layers=20)
    require_fitting_teacher(teacher, tiny / "model", DistillationConfig(top_k=128))
    require_fitting_teacher(tiny / "model", tiny / "model", DistillationConfig(hidden_weight=0.5))


def test_a_teacher_of_other_words_is_refused(tiny: Path, tmp_path: Path) -> None:
    larger = model_like(tiny, tmp_path / "larger", vocab_size=130)
    assert "has a vocabulary of 130 words, the model one of 128" in refusal(larger, tiny)
    other = model_like(tiny, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[WORDS[0]], vocabulary[WORDS[1]] = vocabulary[WORDS[1]], vocabulary[WORDS[0]]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert "numbers 2 words otherwise than the model, such as 'w0': 5 there, 4 here" in refusal(other, tiny)
    (other / "tokenizer.json").unlink()
    (other / "tokenizer_config.json").unlink()
    assert "holds no tokenizer" in refusal(other, tiny)


def test_hidden_states_need_the_same_width_and_depth(tiny: Path, tmp_path: Path) -> None:
    wider = model_like(tiny, tmp_path / "wider", hidden_size=64)
    assert "has hidden_size 64, the model 32" in refusal(wider, tiny, hidden_weight=0.1)
    deeper = model_like(tiny, tmp_path / "deeper", num_hidden_layers=9)
    assert "has num_hidden_layers 9, the model 8" in refusal(deeper, tiny, hidden_weight=0.1)


def test_hidden_states_of_stages_need_the_same_widths_and_depths(tmp_path: Path) -> None:
    for name, depths, widths in (("model", [2, 2], [4, 8]), ("deeper", [2, 3], [4, 8]), ("wider", [2, 2], [4, 9])):
        transformers.ResNetConfig(embedding_size=4, hidden_sizes=widths, depths=depths).save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "model", tmp_path / "same")
    config = DistillationConfig(hidden_weight=0.1)

    def require(teacher: str) -> None:
        require_fitting_teacher(tmp_path / teacher, tmp_path / "model", config, task="image-classification")

    require("same")
    with pytest.raises(UserError, match=r"has depths \[2, 3\], the model \[2, 2\]"):
        require("deeper")
    with pytest.raises(UserError, match=r"has hidden_sizes \[4, 9\], the model \[4, 8\]"):
        require("wider")


def test_only_what_predicts_classes_needs_the_same(tmp_path: Path) -> None:
    """Names of classes stand in every configuration, used or not."""
    for name, labels in (("model", ["no", "yes"]), ("teacher", ["a", "b", "c"])):
        config = transformers.T5Config(vocab_size=128, num_labels=len(labels), id2label=dict(enumerate(labels)))
        config.save_pretrained(tmp_path / name)
        make_tokenizer(tmp_path / name)
    config, folders = DistillationConfig(), (tmp_path / "teacher", tmp_path / "model")
    require_fitting_teacher(*folders, config, task="sequence-to-sequence")
    with pytest.raises(UserError, match=r"has the classes \['a', 'b', 'c'\], the model \['no', 'yes'\]"):
        require_fitting_teacher(*folders, config, task="text-classification")


def test_more_words_than_there_are_are_refused(tiny: Path) -> None:
    assert "top_k 129 is more than the 128 words" in refusal(tiny / "model", tiny, top_k=129)


def test_names_of_families_are_understood(tmp_path: Path) -> None:
    for name, sizes in (("one", {}), ("other", {"n_embd": 64})):
        make_model("gpt2", tmp_path / name, num_hidden_layers=2)
        make_tokenizer(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | sizes))
    with pytest.raises(UserError, match="has hidden_size 64, the model 32"):
        require_fitting_teacher(tmp_path / "other", tmp_path / "one", DistillationConfig(hidden_weight=0.2))


def test_the_teacher_is_divided_and_offloaded_as_the_student_is() -> None:
    assert teacher_settings({"zero_optimization": {"stage": 2}}, "float32")["zero_optimization"] == {"stage": 0}
    offload = {"device": "nvme", "nvme_path": "/fast", "buffer_count": 3}
    zero = {"stage": 3, "offload_param": offload, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True}
    made = teacher_settings({"zero_optimization": zero, "aio": {"block_size": 9}, "optimizer": {}}, "bfloat16")
    assert made["zero_optimization"] == {"stage": 3, "offload_param": {**offload, "nvme_path": "/fast/teacher"}}
    assert made["aio"] == {"block_size": 9}
    assert "optimizer" not in made


def test_metrics_of_steps_that_are_done_again_are_forgotten(tmp_path: Path) -> None:
    first = Metrics(tmp_path / "work", True)
    first.begin(0, ())
    for step in range(1, 5):
        first.record({"step": step, "loss": step / 2})
    with first.path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed here
    again = Metrics(tmp_path / "work", True)
    again.begin(2, ())
    again.record({"step": 3, "loss": 9.0})
    assert [json.loads(line)["loss"] for line in again.path.read_text().splitlines()] == [0.5, 1.0, 9.0]
    others = Metrics(tmp_path / "nobody", False)
    others.begin(0, ("tensorboard",))
    others.record({"step": 1})
    assert not (tmp_path / "nobody").exists()


def test_tensorboard_has_the_losses_by_step_after_a_restart_too(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begin, loss in ((0, 1.0), (2, 5.0)):
        recorded = Metrics(tmp_path, True)
        recorded.begin(begin, ("tensorboard",))
        for step in range(begin + 1, 5):
            recorded.record({"step": step, "loss": loss})
        recorded.end()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 1), (3, 5), (4, 5)]


def test_weights_and_biases_has_them_offline_under_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    work = tmp_path / "my run" / "retrain" / "abc"
    recorded = Metrics(work, True)
    recorded.begin(0, ("wandb",))
    recorded.record({"step": 1, "loss": 2.5})
    assert wandb.run is not None
    assert (wandb.run.project, wandb.run.name) == ("mpruner-dist", "my run")
    assert wandb.run.id == digest(str(work)) != digest(str(tmp_path / "another run" / "retrain" / "abc"))
    assert wandb.run.summary["loss"] == 2.5
    recorded.end()
    assert wandb.run is None
    assert list((work / "wandb").glob("offline-run-*/*.wandb"))


def test_a_logger_that_is_not_installed_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    require_loggers(("tensorboard", "wandb"))
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "wandb" else "there")
    require_loggers(("tensorboard",))
    with pytest.raises(UserError, match=r"wandb, which is not installed: pip install '\.\[wandb\]'"):
        require_loggers(("tensorboard", "wandb"))


def test_a_teacher_of_images_takes_the_same_pixels(tmp_path: Path) -> None:
    def make(name: str, size: int, **processor: Any) -> Path:
        transformers.ViTConfig(image_size=size, num_channels=1).save_pretrained(tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(processor))
        return tmp_path / name

    model = make("model", 8, image_mean=[0.5], image_std=[0.5])

    def require(teacher: Path) -> None:
        require_fitting_teacher(teacher, model, DistillationConfig(), task="image-classification")

    require(make("same", 8))
    with pytest.raises(UserError, match=r"has mean \(0\.4,\), the model \(0\.5,\): both are given the same pixels"):
        require(make("other", 8, image_mean=[0.4], image_std=[0.5]))
    with pytest.raises(UserError, match=r"has size \(16, 16\), the model \(8, 8\)"):
        require(make("larger", 16))
