"""Images with classes: vision models on the whole road."""

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import settings_for, write_config
from safetensors.torch import load_file

from mpruner_dist.config import Config, SourceConfig
from mpruner_dist.data.parts import load_part
from mpruner_dist.data.sources import open_images
from mpruner_dist.errors import UserError
from mpruner_dist.rewriting.proof import verify_checkpoint

Run = Callable[..., tuple[int, str]]
CLASSES = ["dark", "light"]


def write_idx(path: Path, values: np.ndarray) -> None:
    content = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def some_images(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise, brighter where the class is 1."""
    draw = np.random.default_rng(seed)
    labels = (np.arange(count) % 2).astype(np.uint8)
    return (draw.integers(0, 160, (count, 8, 8)) + 90 * labels[:, None, None]).astype(np.uint8), labels


@pytest.fixture(scope="module")
def idx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("idx")
    for prefix, count, ending in (("train", 200, ".gz"), ("t10k", 60, "")):
        pixels, labels = some_images(count, seed=count)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{ending}", pixels)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{ending}", labels)
    return folder


def test_idx_files_are_read_by_split_and_share(idx: Path) -> None:
    pixels, labels = some_images(200, seed=200)
    records, number = open_images(SourceConfig(path=str(idx), take=(0.25, 0.5)), CLASSES)
    found = list(records)
    assert number == len(found) == 50
    assert all((image == pixels[50 + row]).all() for row, (image, _) in enumerate(found))
    assert [label for _, label in found] == labels[50:100].tolist()
    assert open_images(SourceConfig(path=str(idx), split="test"), CLASSES)[1] == 60
    with pytest.raises(UserError, match="no class of the model"):
        list(open_images(SourceConfig(path=str(idx)), CLASSES[:1])[0])


def settings_of_images(folder: Path, idx: Path) -> dict[str, Any]:
    """A configuration that prunes and retrains `model` of a folder on these images."""
    asked = settings_for(folder)
    asked["model"]["task"] = "image-classification"
    asked["data"] = {
        "calibration": {"path": str(idx), "take": [0, 0.3]},
        "train": {"path": str(idx), "take": [0.3, 0.8]},
        "validation": {"path": str(idx), "take": [0.8, 1]},
        "test": {"path": str(idx), "split": "test"},
    }
    asked["collect"] |= {"batch_size": 10, "num_batches": 6}
    return asked


def test_images_are_compared_as_images() -> None:
    data = {part: {"path": part} for part in ("calibration", "test")}
    content = {"model": {"path": "m", "task": "image-classification"}, "data": data, "collect": {"seed": 3}}
    assert Config.model_validate(content).collect.unit == "image"
    assert Config.model_validate(content).collect.seed == 3
    content["collect"] = {"unit": "token"}
    with pytest.raises(ValueError, match=r"collect.unit token is not measured with model.task image-class.*set image"):
        Config.model_validate(content)


@pytest.mark.ray
def test_a_vision_model_is_pruned_retrained_and_measured(idx: Path, tmp_path: Path, mpruner: Run) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=6, image_size=8, patch_size=4,
        num_channels=1, id2label=dict(enumerate(CLASSES)), label2id={name: n for n, name in enumerate(CLASSES)},
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
            if ".3." in name and ("o_proj" in name or "fc2" in name or "output.dense" in name):
                parameter.mul_(1e-3)
    model.eval().save_pretrained(tmp_path / "model")
    asked = settings_of_images(tmp_path, idx)
    asked["plan"]["keep_layers"] = 5
    asked["retrain"] |= {"steps": 8, "batch_size": 8}
    asked["retrain"]["distillation"] = {"weight": 0.3, "hidden_weight": 0.2}
    code, output = mpruner("run", write_config(tmp_path / "config.yaml", asked), "--run-dir", tmp_path / "run")
    assert code == 0, output
    run = tmp_path / "run"
    assert json.loads((run / "plan.json").read_text())["dropped"] == [3]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["retrained"]["loss"] < evaluation["pruned"]["loss"]
    part = load_part(run / "data/test.safetensors")
    pixels = (torch.from_numpy(part.pixels).float() / 255 - 0.5) / 0.5
    for label, source in (("original", tmp_path / "model"), ("retrained", run / "retrained")):
        verify_checkpoint(source)
        model = transformers.AutoModelForImageClassification.from_pretrained(source).eval()
        with torch.no_grad():
            logits = model(pixel_values=pixels).logits
        labels = torch.from_numpy(part.labels).long()
        loss = float(torch.nn.functional.cross_entropy(logits, labels))
        assert evaluation[label]["loss"] == pytest.approx(loss, rel=1e-4)
        assert evaluation[label]["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    assert json.loads((run / "cka.json").read_text())["num_samples"] == 60
    assert "images/s" in output
    page = (run / "report.html").read_text()
    assert "6 batches of 10 images" in page
    assert "AutoTokenizer" not in (run / "pruned/README.md").read_text()
    code, output = mpruner("run", tmp_path / "config.yaml", "--run-dir", tmp_path / "dry", "--dry-run")
    assert code == 0, output
    assert "6 batches of 10 images" in " ".join(output.split())


def make_resnet(folder: Path, idle: list[tuple[int, int]]) -> None:
    """A residual network of three stages; some blocks, by stage and number, do almost nothing."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16, 16], depths=[3, 4, 3], layer_type="basic",
        id2label=dict(enumerate(CLASSES)), label2id={name: n for n, name in enumerate(CLASSES)},
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config).train()
    pixels = torch.from_numpy(some_images(64)[0]).float()[:, None] / 255
    with torch.no_grad():
        for stage, block in idle:
            layer = model.resnet.encoder.stages[stage].layers[block].layer[-1]
            layer.normalization.weight.mul_(1e-3)
        for _ in range(30):  # running means of these images
            model(pixel_values=(pixels - 0.5) / 0.5)
    model.eval().save_pretrained(folder)


def test_the_stages_of_a_cnn_are_pruned_apart(idx: Path, tmp_path: Path, without_ray: Run) -> None:
    """Layers count from the first stage to the last; the first of a stage stays, and so does each stage's own plan."""
    make_resnet(tmp_path / "model", [(0, 1), (1, 2), (2, 1)])
    asked = settings_of_images(tmp_path, idx)
    asked["plan"] = {"method": "anchor", "threshold": 0.9999, "protect_last": 0}
    asked["retrain"] |= {"steps": 30, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 3e-3, "save_every": 30}
    asked["evaluate"] = {"batch_size": 20}
    asked["retrain"]["distillation"] = {"weight": 0.2, "hidden_weight": 0.1}
    config = write_config(tmp_path / "config.yaml", asked)
    code, output = without_ray("run", config, "--run-dir", tmp_path / "run", "--set", "cluster.workers=2")
    assert code == 0, output
    run = tmp_path / "run"
    plan = json.loads((run / "plan.json").read_text())
    assert plan["dropped"] == [1, 5, 8]
    similarity = json.loads((run / "cka.json").read_text())
    assert list(similarity["stacks"].values()) == [3, 4, 3]
    assert similarity["layers"][3] == "resnet.encoder.stages.1.layers.0"
    model = transformers.AutoModelForImageClassification.from_pretrained(run / "retrained").eval()
    assert model.config.depths == [2, 3, 2]
    verify_checkpoint(run / "retrained")
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert [entry["layers"] for entry in evaluation.values()] == [10, 7, 7]
    assert evaluation["pruned"]["loss"] == pytest.approx(evaluation["original"]["loss"], rel=0.05)
    assert evaluation["retrained"]["loss"] < evaluation["pruned"]["loss"]
    part = load_part(run / "data/test.safetensors")
    pixels = (torch.from_numpy(part.pixels).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    loss = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(part.labels).long()))
    assert evaluation["retrained"]["loss"] == pytest.approx(loss, rel=1e-4)
    before, after = (load_file(run / name / "model.safetensors") for name in ("pruned", "retrained"))
    means = [name for name in before if name.endswith("running_mean")]
    assert means
    assert all(not torch.equal(before[name], after[name]) for name in means)  # what was gathered is exported
