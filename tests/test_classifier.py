"""The whole road on a small text classifier, with real Ray and real DeepSpeed."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import WORDS, Cli, make_tokenizer, settings_for, write_config

from mpruner_dist.data.parts import load_part
from mpruner_dist.rewriting.proof import verify_checkpoint

LAYERS, IDLE = 6, [2, 3]
CLASSES = ["low", "high"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 6 layers, two of which do almost nothing, and texts with the classes that it finds itself."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=LAYERS, vocab_size=128,
        max_position_embeddings=64, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(CLASSES)), label2id={name: number for number, name in enumerate(CLASSES)},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            if any(f".layer.{layer}." in name for layer in IDLE) and "output.dense" in name:
                parameter.mul_(1e-3)
    model.eval().save_pretrained(folder / "model")
    make_tokenizer(folder / "model")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(4, 24))) for _ in range(400)]
    ids = transformers.AutoTokenizer.from_pretrained(folder / "model")(texts)["input_ids"]
    with torch.no_grad():
        margins = torch.tensor([float(model(torch.tensor([row])).logits.diff()) for row in ids])
        model.classifier.bias += torch.tensor([margins.median() / 2, -margins.median() / 2])  # as many of each class
    model.save_pretrained(folder / "model")
    found = (margins > margins.median()).int().tolist()
    lines = [json.dumps({"sentence": text, "kind": CLASSES[kind]}) for text, kind in zip(texts, found, strict=True)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def settings(folder: Path) -> dict[str, Any]:
    settings = settings_for(folder)
    settings["model"]["task"] = "text-classification"
    for part in ("calibration", "train", "validation", "test"):
        settings["data"][part] |= {"text_field": "sentence", "label_field": "kind"}
    settings["collect"] |= {"batch_size": 6, "samples": 40}
    settings["retrain"] |= {"steps": 16, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 3e-3, "save_every": 8}
    settings["retrain"]["distillation"] |= {"weight": 0.3, "hidden_weight": 0.2}
    settings["plan"]["keep_layers"] = 3
    settings["evaluate"] = {"batch_size": 7}
    return settings


@pytest.mark.ray
def test_a_classifier_is_pruned_retrained_and_measured(folder: Path, tmp_path: Path, mpruner: Cli) -> None:
    """Two workers; what the original scores is what transformers alone finds, a text at a time and without padding."""
    config = write_config(tmp_path / "config.yaml", settings(folder))
    code, output = mpruner("run", config, "--run-dir", tmp_path / "run", "--set", "cluster.workers=2")
    assert code == 0, output
    run = tmp_path / "run"
    assert set(IDLE) < set(json.loads((run / "plan.json").read_text())["dropped"])
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["retrained"]["loss"] < evaluation["pruned"]["loss"]
    assert evaluation["original"]["accuracy"] > 0.95 > evaluation["retrained"]["accuracy"]
    part = load_part(run / "data/test.safetensors")
    for label, source in (("original", folder / "model"), ("pruned", run / "pruned")):
        verify_checkpoint(source)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(source).eval()
        with torch.no_grad():
            logits = torch.cat([
                model(torch.from_numpy(part.ids[row : row + 1, :length]).long()).logits
                for row, length in enumerate(part.lengths)
            ])  # fmt: skip
        labels = torch.from_numpy(part.labels).long()
        found = evaluation[label]
        assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
        assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
        assert found["texts"] == len(part)
    assert "macro F1" in output
    assert "texts/s" in output
    assert "AutoModelForSequenceClassification" in (run / "retrained/README.md").read_text()
    assert "labelled texts" in output
    page = (run / "report.html").read_text()
    assert "points" in page
    assert "perplexity" not in page
    similarity = json.loads((run / "cka.json").read_text())
    assert similarity["num_samples"] == 7 * 40
    assert similarity["layers"][0] == "bert.encoder.layer.0"


def test_rounds_gate_a_classifier_by_its_accuracy(folder: Path, tmp_path: Path, without_ray: Cli) -> None:
    """Plans judged by the task's own loss: what does almost nothing goes; what is needed breaks the tolerance."""
    asked = settings(folder)
    asked["plan"] = {"method": "greedy", "keep_layers": 2, "protect_first": 0, "protect_last": 0}
    asked["rounds"] = {"tolerance": 0.06, "metric": "accuracy", "remove": 2, "max_stride": 1}
    asked["retrain"] = None
    config = write_config(tmp_path / "config.yaml", asked)
    code, output = without_ray("run", config, "--run-dir", tmp_path / "run")
    assert code == 0, output
    rounds = json.loads((tmp_path / "run/rounds.json").read_text())
    assert rounds["metric"] == "accuracy"
    assert rounds["original"]["accuracy"] > 0.95
    assert [entry["accepted"] for entry in rounds["rounds"]] == [True, False]
    assert rounds["rounds"][0]["removed"] == IDLE
    judged = json.loads((tmp_path / "run/round-01/plan.json").read_text())["judged"]
    assert judged["tokens"] == 40  # one prediction a text of the validation part
    baseline = json.loads((tmp_path / "run/baseline.json").read_text())["original"]
    assert judged["loss_of_the_whole_model"] == pytest.approx(baseline["loss"], rel=1e-5)


def test_a_dry_run_counts_texts(folder: Path, tmp_path: Path, command: Cli) -> None:
    config = write_config(tmp_path / "config.yaml", settings(folder))
    code, output = command("run", config, "--run-dir", tmp_path / "run", "--dry-run")
    assert code == 0, output
    assert "40 labelled texts" in output
    assert "3 models on 80 texts" in " ".join(output.split())
